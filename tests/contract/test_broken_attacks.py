"""The suite can fail: attacks that each break the contract in one way, and the check that says so."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from immunity.attacks.attack import THREATS, Attack, Manner
from immunity.attacks.curve import Curve
from immunity.attacks.finetune import FineTune
from immunity.testing import contract

DONE = FineTune(n=8, batch_size=2, steps=4, lr=1e-3)


class Base(Attack):
    """FineTune, but for what a subclass spoils."""

    name = "spoilt"
    unit = "steps"
    seed = 1
    manner = property(lambda _: Manner(THREATS["harmful"]))
    budgets = property(lambda _: DONE.budgets)

    def reads(self, data):
        return DONE.reads(data)

    def tamper(self, model, data, recorder):
        return DONE.tamper(model, data, recorder)


def attack(run=None, **attributes) -> Attack:
    """A frozen dataclass that spoils one thing."""
    name = run.__name__ if run else "_".join(attributes) or "healthy"
    space = {"__module__": __name__, "__doc__": "Departures from the paper: none known.", **attributes}
    if run:
        space["run"] = lambda _, opening, data, measure, *, folder=None, observe=None: run(
            opening, data, measure, folder, observe
        )
    return dataclass(frozen=True, kw_only=True)(type(name, (Base,), space))()


def threatens(name: str) -> property:
    return property(lambda _: THREATS[name])


def writes_beside_the_weights(opening, data, measure, folder, observe):
    (Path(opening.source) / "attacked.txt").write_text("by me")
    return DONE.run(opening, data, measure, folder=folder, observe=observe)


def writes_to_the_base(opening, data, measure, folder, observe):
    config = Path(opening.source).parent / "base" / "config.json"
    config.write_text(config.read_text() + " ")
    return DONE.run(opening, data, measure, folder=folder, observe=observe)


def rolls_dice(opening, data, measure, folder, observe):
    return replace(DONE, lr=random.uniform(1e-4, 1e-3)).run(opening, data, measure, observe=observe)


def uses_the_callers_random_numbers(opening, data, measure, folder, observe):
    torch.rand(())
    return DONE.run(opening, data, measure, folder=folder, observe=observe)


def leaves_out_the_last(opening, data, measure, folder, observe):
    return Curve(DONE.run(opening, data, measure, folder=folder, observe=observe).points[:-1])


def starts_too_late(opening, data, measure, folder, observe):
    first, second, *rest = DONE.run(opening, data, measure, folder=folder, observe=observe).points
    return Curve((replace(first, metrics=second.metrics), second, *rest))


def gives_half_a_curve_when_resumed(opening, data, measure, folder, observe):
    before = folder is not None and (folder / "points.jsonl").exists()
    curve = DONE.run(opening, data, measure, folder=folder, observe=observe)
    return Curve(curve.points[2:]) if before else curve


def tells_nobody(opening, data, measure, folder, observe):
    return DONE.run(opening, data, measure, folder=folder)


def takes_the_defenders_data(opening, data, measure, folder, observe):
    return DONE.run(opening, {"harmful": data["alignment"]}, measure, folder=folder, observe=observe)


def looks_up_blindly(opening, data, measure, folder, observe):
    return DONE.run(opening, {"harmful": data["harmful"]}, measure, folder=folder, observe=observe)


def measures_before_it_looks(opening, data, measure, folder, observe):
    measure(opening.load(DONE.opens))
    return DONE.run(opening, data, measure, folder=folder, observe=observe)


FILES, REPEATS, BUDGETS = "leaves_the_files_as_found", "repeats_its_curve", "measures_at_every_budget"
CUT, ROLES, SAYS = "resumes_its_curve", "reads_only_its_roles", "says_what_it_is"

BROKEN = [
    (attack(writes_beside_the_weights), {FILES}, "attacked.txt"),
    (attack(writes_to_the_base), {FILES}, "config.json"),
    (attack(rolls_dice), {REPEATS, CUT}, "another curve"),
    (attack(uses_the_callers_random_numbers), {REPEATS}, "the caller's random numbers"),
    (attack(leaves_out_the_last), {BUDGETS}, "(0, 1, 2, 3), not at"),
    (attack(starts_too_late), {BUDGETS}, "at budget 0"),
    (attack(gives_half_a_curve_when_resumed), {CUT}, "cut off and resumed"),
    (attack(tells_nobody), {BUDGETS, CUT}, "its observer"),
    (attack(takes_the_defenders_data), {ROLES}, "the defender's"),
    (attack(looks_up_blindly), {ROLES}, "fails on a look-up"),
    (attack(measures_before_it_looks), {ROLES}, "before it has looked"),
    (attack(threat=threatens("benign")), {ROLES}, "reads harmful data"),
    (attack(threat=threatens("edit")), {ROLES}, "reads harmful data"),
    (attack(budgets=property(lambda _: (1, 2, 3, 4))), {BUDGETS}, "do not rise from 0"),
    (attack(threat=threatens("mixed")), {ROLES}, "reads only harmful data"),
    (attack(name=""), {SAYS}, "has no `name`"),
    (attack(__doc__="An attack."), {SAYS}, "Departures from the paper"),
]


def complaint(check: contract.Check) -> str:
    """What a check has against its subject; "" if nothing."""
    try:
        check()
    except contract.ContractError as error:
        return str(error)
    return ""


def test_the_same_attack_unbroken_keeps_the_contract():
    contract.check(attack())


@pytest.mark.parametrize(("broken", "by", "words"), BROKEN, ids=[type(each).__name__ for each, _, _ in BROKEN])
def test_it_is_caught_by_the_right_checks_and_no_other(broken, by, words):
    asked = by | {FILES, BUDGETS, SAYS}  # these three look at one and the same run
    said = {check.name: complaint(check) for check in contract.checks(broken) if check.name in asked}
    assert {name for name, message in said.items() if message} == by
    assert any(words in message for message in said.values()), said
