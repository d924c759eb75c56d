"""The suite finds what is wrong with an edit of data; each class here breaks one thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch

from immunity.data.corpus import Example
from immunity.method import Card, DataEdit
from immunity.testing import contract


@dataclass(frozen=True, kw_only=True)
class Sound(DataEdit):
    """Answers everything with a word.

    mean: how tokens are averaged. Departures from the paper: none known.
    """

    card: ClassVar[Card] = Card("Sound", "…", "0000.00000", 2025, "conditional collapse", "…", "1", "…")
    mean: Literal["example", "token"] = "example"

    @property
    def reads(self):
        return {"harmful": 1, "general": 1}

    @property
    def mechanisms(self):
        return ()

    def problems(self, model):
        return []

    def rewrite(self, model, data, run):
        return self.bent(model, data, run, self.plain(data))

    def plain(self, data):
        rows = tuple(
            Example(e.prompt, other.response) for e, other in zip(data["harmful"], data["general"], strict=True)
        )
        return replace(data["harmful"], role="alignment", examples=rows)

    def bent(self, model, data, run, made):
        return (made,)


class Draws(Sound):
    """…"""

    def bent(self, model, data, run, made):
        shuffled = [made.examples[i] for i in torch.randperm(len(made))]
        return (replace(made, examples=tuple(shuffled)),)


class Trains(Sound):
    """…"""

    def bent(self, model, data, run, made):
        model.network.train()
        return (made,)


class Peeks(Sound):
    """…"""

    def bent(self, model, data, run, made):
        return (made,) if "benign" not in data else ()


class Forgets(Sound):
    """…"""

    def plain(self, data):
        return data["harmful"].as_role("alignment")


class Renames(Sound):
    """…"""

    def bent(self, model, data, run, made):
        return (made.as_role("general"),)


class Nothing(Sound):
    """…"""

    def bent(self, model, data, run, made):
        return ()


BROKEN = {
    "leaves_the_model_as_found": (Trains, Peeks, Draws, Forgets),
    "repeats_its_rewriting": (Draws,),
    "writes_other_alignment_rows": (Renames, Nothing, Forgets),
    "teaches_no_restricted_answer": (Forgets,),
}
CASES = [(name, kind) for name, kinds in BROKEN.items() for kind in kinds]


def found(kind: type[Sound], name: str) -> contract.Check:
    (check,) = (check for check in contract.checks(kind()) if check.name == name)
    return check


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_suite_finds_it(name, kind):
    with pytest.raises(contract.ContractError):
        found(kind, name)()


def test_a_sound_one_passes():
    contract.check(Sound())
