"""Sentences made of counts: singular and plural, whatever the numbers are."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from immunity.metrics.battery import summary
from immunity.metrics.breaks import break_rows
from immunity.metrics.claims import Claim, Condition, Verdict3, condition
from immunity.metrics.conclusion import amount
from immunity.metrics.counted import counted, in_units, verb
from immunity.metrics.curves import Curve, Point
from immunity.metrics.generalisation import generalisation
from immunity.metrics.resistance import resistance
from immunity.metrics.stability import stability
from immunity.metrics.trainability import trainability
from immunity.metrics.unscored import sentences

_MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "made_up_battery.py"))
curve, falls, made_up = (_MADE[name] for name in ("curve", "falls", "result"))
WORD = "prompt|seed|domain|claim|attack|answer|example|step|token|second|test|run|trial"
ONE = re.compile(
    rf"(?<![\d.,–-])1 (?:[a-z]+-?[a-z]* )?(?:{WORD})s\b|(?<![\d.,])1 (?:[a-z-]+ )?(?:{WORD}) (?:were|are|have|do)\b"
)
MANY = re.compile(rf"(?<![\d.,–-])(?:0|[2-9]|\d\d+) (?:[a-z]+-[a-z]+ )?(?:{WORD})\b(?!s)")
SMALL = settings(max_examples=25, deadline=None)


def right(text: str) -> None:
    """It says neither "1 seeds" nor "3 seed"."""
    assert ONE.search(text) is None, text
    assert MANY.search(text) is None, text


def all_right(found: Condition) -> None:
    for says in (found.says, *(claim.says for claim in found.claims)):
        right(says)


@pytest.mark.parametrize("text", ["1 seeds", "1 held-out domain were attacked", "2 prompt", "of 12 step", "1 claims"])
def test_the_test_sees_what_is_wrong(text: str) -> None:
    with pytest.raises(AssertionError):
        right(text)


@given(st.integers(0, 2000))
def test_numbers_of_things(n: int) -> None:
    assert counted(n, "seed").endswith("seed") == (n == 1)
    assert counted(n, "query", "queries").endswith("query") == (n == 1)
    assert in_units(n, "changes of template") == f"{n:,} change{'' if n == 1 else 's'} of template"
    assert in_units(n, "% of weights pruned") == f"{n:,} % of weights pruned"
    assert verb(n, "was", "were") == ("was" if n == 1 else "were")
    assert amount(float(n), "examples") == f"{n:,} example{'' if n == 1 else 's'}"
    assert amount(float(n), "flops") == f"{n:,} FLOP"


@SMALL
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_generalisation(domains: int, seeds: int, n: int, mine: float, theirs: float) -> None:
    rows = [
        {
            "model": role, "domain": name, "seed": seed, "at": 0 if harm > 0.1 else 8.0, "before": 4.0, "tried": 64.0,
            "released": harm, "n": n,
        }
        for role, harm in (("defended", mine), ("baseline", theirs))
        for name in ["home", *(f"d{i}" for i in range(domains))]
        for seed in range(seeds)
    ]  # fmt: skip
    found = generalisation(rows, ["home"])
    all_right(found)
    said = next(one.says for one in found.claims if one.name == "held-out domains")
    assert f"{counted(domains, 'held-out domain')} {'was' if domains == 1 else 'were'} attacked" in said


@SMALL
@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 3))
def test_stability(n: int, seeds: int, tasks: int) -> None:
    scores = [[1.0] * n] * seeds
    rows = [{"task": f"t{i}", "kind": "accuracy", "model": scores, "baseline": scores} for i in range(tasks)]
    all_right(stability(rows))


@SMALL
@given(st.integers(1, 40), st.integers(1, 3))
def test_trainability(n: int, seeds: int) -> None:
    rows = [
        {
            "task": "t", "adapter": "full", "lr": 1e-3, "seed": seed, "model": role, "points": [[0, 0.0], [1, 1.0]],
            "diverged": False, "per_prompt": [1.0] * n,
        }
        for role in ("model", "baseline")
        for seed in range(seeds)
    ]  # fmt: skip
    all_right(trainability(rows))


@SMALL
@given(st.integers(1, 3), st.sampled_from([0.0, 0.15, 0.9]), st.integers(1, 64), st.integers(1, 3))
def test_resistance_and_a_battery(seeds: int, top: float, at: int, attacks: int) -> None:
    made = made_up()
    names = ["full", "lora", "mixed"][:attacks]
    made["curves"] = [
        curve(model, name, falls(harm, at), seed)
        for model, harm in (("rock", top), ("SFT", 0.9))
        for name in names
        for seed in range(seeds)
    ]
    found = summary(made)
    for row in found["models"]:
        right(row["verdict"])
        for flag in row["flags"]:
            right(flag["says"])
    runs = break_rows(made, "rock", "SFT", metric=found["metric"], phi=0.1)
    for claimed in (None, 1.0, 8.0):
        all_right(resistance(found, runs, "rock", claimed=claimed, axis="step"))


@SMALL
@given(st.integers(1, 6), st.integers(1, 6))
def test_answers_without_a_score(unscored: int, scored: int) -> None:
    row = [None] * unscored + [0.0] * (scored - 1)
    (said,) = sentences([Curve("d", "a", "harmful", 1, (Point(1, {}, per_prompt={"harm": row}),))])
    right(said)
    assert (" has no score" in said) == (unscored == 1)


@given(st.lists(st.sampled_from(["pass", "fail", "not enough evidence"]), min_size=1, max_size=4))
def test_conditions_count_their_claims(verdicts: list[Verdict3]) -> None:
    found = condition("stability", [Claim(name="c", says="So.", verdict=one) for one in verdicts], {})
    n = verdicts.count(found.verdict)
    for one, many in (("passes", "pass"), ("fails", "fail"), ("is open", "are open")):
        if f"claims {one})" in found.says:
            assert n == 1
        if f"claims {many})" in found.says:
            assert n > 1
