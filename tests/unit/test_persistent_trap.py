"""Who is asked for what in the persistent trap, and that each of its ingredients can be left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from immunity import spec
from immunity.errors import SettingsError
from immunity.mechanisms import Collapse, GradientCoupling, LookAhead
from immunity.methods import persistent_trap
from immunity.methods.persistent_trap import PersistentTrap
from immunity.models import LoRA, attach
from immunity.testing import tiny
from immunity.testing.watch import batches, spied
from immunity.theta import Theta

ATTACKER, HONEST = "adamw lr=1e-3", "adamw lr=1e-3 on=benign"
SMALL = PersistentTrap(pool=(ATTACKER, HONEST), moves=2)


def asked(method: PersistentTrap, turns: int) -> list[list[str]]:
    """For each turn the gradients that are taken, as "loss/role"; ℓ at θ is the first."""
    model = tiny.language_model()
    theta, along, found = Theta(model.network, token=model.word_id), method.start(model), []
    for turn in range(turns):
        torch.manual_seed(turn)
        with spied(theta) as calls:
            along(theta, batches(method))
        found.append([f"{call.loss.name}/{call.batch.role}" for call in calls if call.name == "grad"])
    return found


def test_an_attacker_is_asked_to_fall_and_an_honest_user_is_not():
    first, second, third = asked(SMALL, 3)
    assert first == ["nll/alignment", "nll/harmful", "nll/harmful", "collapse/general", "kl-from-uniform/harmful"]
    assert second == ["nll/alignment", "nll/benign", "nll/benign", "nll/clear"]
    assert third == first


@pytest.mark.parametrize(
    ("change", "gone", "reads"),
    [
        ({"restricted": "none"}, "kl-from-uniform/harmful", {"alignment": 1, "harmful": 2, "general": 1, "benign": 3}),
        ({"general": "none"}, "collapse/general", {"alignment": 1, "harmful": 3, "general": 1, "benign": 3}),
        ({"pool": (ATTACKER,)}, "nll/clear", {"alignment": 1, "harmful": 3, "general": 1}),
        ({"pool": (ATTACKER,), "general": "none"}, "collapse/general", {"alignment": 1, "harmful": 3}),
    ],
    ids=str,
)
def test_each_ingredient_can_be_left_out(change, gone, reads):
    method = replace(SMALL, **change)
    assert dict(method.reads) == reads
    left = {name for turn in asked(method, 2) for name in turn}
    assert gone not in left
    everything = {name for turn in asked(SMALL, 2) for name in turn}
    assert left < everything


def test_coupling_asks_at_theta_behind_an_attacker_or_at_both(monkeypatch):
    pair = ["nll/harmful", "nll/general"]
    bare = replace(SMALL, general="none", restricted="none", couple=(0.5, 0.5))
    walk, differences = ["nll/harmful"] * 2, pair
    at_theta, behind, both = (asked(replace(bare, couple=at), 2) for at in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5)))
    assert at_theta == [
        ["nll/alignment", *pair, *differences, *walk],
        ["nll/alignment", *pair, *differences, "nll/benign", "nll/benign", "nll/clear"],
    ]
    assert behind == [
        ["nll/alignment", *walk, *pair, *differences],
        ["nll/alignment", *["nll/benign"] * 2, "nll/clear"],
    ]
    assert both[0] == ["nll/alignment", *pair, *differences, *walk, *pair, *differences]
    assert dict(bare.reads) == {"alignment": 1, "harmful": 3, "general": 1, "benign": 3}
    assert GradientCoupling() in bare.mechanisms
    assert GradientCoupling() not in SMALL.mechanisms
    assert bare.problems(tiny.language_model()) == []
    monkeypatch.setattr(persistent_trap, "EPS", 1e-20)
    assert [problem.where for problem in bare.problems(tiny.language_model())] == ["couple"]


def test_the_price_of_a_step_is_what_the_card_says():
    for m in (1, 4):
        method = replace(SMALL, moves=m)
        assert [len(turn) for turn in asked(method, 2)] == [m + 3, m + 2]
    assert "m + 3 (m + 2" in PersistentTrap.card.gradients


def test_a_horizon_of_one_turn_is_no_persistence():
    model = tiny.language_model()
    method = replace(SMALL, pool=(ATTACKER,), horizon=(2, 2))
    theta, along = Theta(model.network, token=model.word_id), method.start(model)
    went = []
    for _ in range(2):
        along(theta, batches(method))
        went.append(theta.clear()["distance/0"])
    assert went[0] == went[1] > 0


def test_what_is_replayed_and_mixed_is_read_once_for_each_move():
    assert dict(replace(SMALL, pool=("adamw lr=1 mix=0.1",)).reads) == {
        "alignment": 1,
        "harmful": 3,
        "general": 1,
        "benign": 2,
    }
    assert dict(replace(SMALL, pool=("adamw lr=1 replay=0.1",)).reads) == {"alignment": 1, "harmful": 3, "general": 3}


def test_attackers_are_declared_and_honest_users_are_not():
    method = replace(SMALL, pool=("adamw lr=1e-4..1e-2", "sgd lr=0.1", "sgd lr=0.1", HONEST), horizon=(4, 32))
    assert method.mechanisms == (
        LookAhead(steps=32, radius=1e-3, rule="adamw"),
        LookAhead(steps=32, radius=0.1, rule="plain"),
        Collapse(word="error", on="general"),
        Collapse(word="", on="harmful"),
    )
    assert replace(method, general="error+the", restricted="none").mechanisms[-1] == Collapse(word="", on="general")


def test_all_problems_are_reported_at_once():
    idle = PersistentTrap(lam=0.0, mu=0.0, clear=0.0, general=" ")
    assert [problem.where for problem in idle.problems(tiny.language_model())] == ["lam", "mu", "clear", "general"]
    nothing = PersistentTrap(general="none", restricted="none")
    assert [problem.where for problem in nothing.problems(tiny.language_model())] == ["general"]
    assert PersistentTrap().problems(attach(tiny.language_model(), LoRA(r=2))) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"lam": -0.1},
        {"couple": (0.0, -0.1)},
        {"moves": 0},
        {"most": 0.0},
        {"moves": 4, "horizon": (3, 64)},
        {"horizon": (64, 16)},
        {"pool": ()},
        {"pool": (HONEST,)},
        {"pool": ("adamw",)},
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(settings):
    with pytest.raises(SettingsError):
        PersistentTrap(**settings)


def test_a_pool_can_be_said_on_the_command_line():
    words = spec.pairs(
        ["pool=adamw lr=1e-4; sgd lr=0.1 on=benign", "horizon=8,32", "general=error+the", "couple=0.5,1"]
    )
    found = spec.build(PersistentTrap(), words)
    assert found.pool == ("adamw lr=1e-4", "sgd lr=0.1 on=benign")
    assert found.horizon == (8, 32)
    assert (found.general, found.couple) == ("error+the", (0.5, 1.0))
