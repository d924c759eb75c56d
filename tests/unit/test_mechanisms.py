"""Mechanisms: what a defence says that it does, how it is written down, and what the contract asks of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity import simulated
from immunity.errors import SettingsError
from immunity.mechanisms import (
    KINDS,
    Collapse,
    Conditioning,
    DirectionSpread,
    Drift,
    EntropyMinimum,
    GradientCoupling,
    Interventions,
    Layers,
    LookAhead,
    LowRankEdit,
    Patches,
    Representation,
    Unlearning,
    read,
    written,
)
from immunity.method import Card, GradientMethod
from immunity.methods.ctrap import CTRAP
from immunity.methods.sft import SFT
from immunity.testing import check_settings
from immunity.testing.watch import ContractError

K6 = CTRAP(lookahead=6, step="adam", alpha=0.12)
ONE_OF_EACH = (
    LookAhead(steps=3, radius=0.2, rule="normalised"),
    Collapse(word="blank", on="general"),
    GradientCoupling(),
    Layers(protected="first-half"),
    LowRankEdit(k=6),
    Conditioning(),
    EntropyMinimum(),
    Representation(layers="0,3,5"),
    Drift(radius=2.0, per="batch", layers="all"),
    DirectionSpread(),
    Unlearning(),
    Interventions(where="input", rank=2, steps=30),
    Patches(rank=8, radius=0.1, targets="attention"),
)


def test_ctrap_declares_its_walk_and_its_word():
    assert CTRAP.paper().mechanisms == (
        LookAhead(steps=1, radius=0.1, rule="plain"),
        Collapse(word="error", on="general"),
    )
    assert CTRAP.released().mechanisms[1] == Collapse(word="error", on="alignment")
    assert K6.mechanisms[0] == LookAhead(steps=6, radius=0.12, rule="adam")
    assert CTRAP(word="blank").mechanisms[1].word == "blank"


def test_what_does_nothing_declares_nothing():
    assert SFT().mechanisms == ()
    assert CTRAP(lam=0.0).mechanisms == ()
    assert CTRAP(alpha=0.0).mechanisms == (Collapse(word="error", on="general"),)


def test_the_rules_are_those_of_the_simulated_attackers():
    for rule in get_args(simulated.Rule):
        assert LookAhead(steps=1, radius=0.1, rule=rule).rule == rule
    with pytest.raises(SettingsError, match="rule"):
        LookAhead(steps=1, radius=0.1, rule="sgd")


def test_one_of_each_is_one_of_each():
    assert {type(one) for one in ONE_OF_EACH} == set(KINDS.values())


@given(st.lists(st.sampled_from(ONE_OF_EACH)), st.integers(1, 99), st.floats(1e-6, 1e3))
def test_mechanisms_survive_json_in_order(some, steps, radius):
    whole = (*some, LookAhead(steps=steps, radius=radius, rule="plain"))
    assert read(json.loads(json.dumps(written(whole), allow_nan=False))) == whole


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"mechanism": "magic"}, "magic"),
        ({}, "None"),
        ({"mechanism": "collapse", "word": "error"}, "word, on"),
        ({"mechanism": "collapse", "word": "error", "on": "general", "more": 1}, "more"),
        ({"mechanism": "look-ahead", "steps": 0, "radius": 0.1, "rule": "plain"}, "steps"),
        ({"mechanism": "look-ahead", "steps": True, "radius": 0.1, "rule": "plain"}, "steps"),
        ({"mechanism": "look-ahead", "steps": 1, "radius": "0.1", "rule": "plain"}, "radius"),
        ({"mechanism": "look-ahead", "steps": 1, "radius": float("inf"), "rule": "plain"}, "radius"),
        ({"mechanism": "collapse", "word": 3, "on": "general"}, "word"),
        ({"mechanism": "layers", "protected": "upper"}, "upper"),
        ({"mechanism": "layers", "protected": ""}, "protected"),
        ({"mechanism": "low-rank-edit", "k": 0}, "k = 0"),
        ({"mechanism": "drift", "radius": 0.0, "per": "batch", "layers": "all"}, "radius"),
        ({"mechanism": "drift", "radius": 2.0, "per": "token", "layers": "all"}, "per"),
        ({"mechanism": "interventions", "where": "mlp", "rank": 2, "steps": 30}, "where"),
        ({"mechanism": "interventions", "where": "input", "rank": 0, "steps": 30}, "rank"),
        ({"mechanism": "interventions", "where": "input", "rank": 2, "steps": 1.5}, "steps"),
        ({"mechanism": "patches", "rank": True, "radius": 0.1, "targets": "attention"}, "rank"),
        ({"mechanism": "patches", "rank": 8, "radius": -0.1, "targets": "attention"}, "radius"),
        ({"mechanism": "patches", "rank": 8, "radius": 0.1, "targets": "head"}, "targets"),
    ],
)
def test_a_record_that_is_not_understood_is_refused_not_skipped(row, says):
    with pytest.raises(SettingsError, match=says):
        read([row])


def trap(declares, *, block="conditional collapse"):
    """A method that declares ``declares(its strength)``."""

    @dataclass(frozen=True, kw_only=True)
    class Trap(GradientMethod):
        """lam: the strength.

        Departures from the paper: none known.
        """

        card = Card("Trap", "A trap", "0000.00000", 2025, block, "trap", "1", "Does what it says.")
        strength = "lam"
        lam: float = 0.5

        @property
        def reads(self):
            return {"alignment": 1}

        @property
        def mechanisms(self):
            return declares(self.lam)

        def problems(self, model):
            return []

        def gradient(self, theta, batch):
            raise NotImplementedError

    return Trap()


def test_the_contract_accepts_mechanisms_that_end_with_the_strength():
    check_settings.says_what_it_is(trap(lambda lam: (GradientCoupling(),) if lam else ()))
    check_settings.says_what_it_is(trap(lambda _: ()))
    for method in (CTRAP(), CTRAP.paper(), CTRAP.released(), K6, SFT()):
        check_settings.says_what_it_is(method)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (trap(lambda _: [GradientCoupling()]), "give a tuple"),
        (trap(lambda _: ("collapse",)), "give a tuple"),
        (trap(lambda _: (GradientCoupling(), GradientCoupling())), "twice"),
        (trap(lambda _: (GradientCoupling(),)), "lam = 0"),
        (trap(lambda lam: (GradientCoupling(),) if lam else (), block="baseline"), "baseline"),
    ],
    ids=["list", "text", "twice", "strength", "baseline"],
)
def test_the_contract_refuses_what_is_no_declaration(method, says):
    with pytest.raises(ContractError, match=says):
        check_settings.says_what_it_is(method)
