"""Edits of weights that break the contract are found out, each by the check that is for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from immunity.losses import causal_lm
from immunity.mechanisms import LowRankEdit
from immunity.method import Problem
from immunity.methods.lox import LoX
from immunity.stored import Stored
from immunity.testing import contract, tiny
from immunity.weight_edit import WeightEdit


@dataclass(frozen=True, kw_only=True)
class Edit(WeightEdit):
    """Adds a share of the difference to every matrix, or does something that it should not.

    Attributes:
        base: What the model was made from.
        share: Of the difference.
        fault: What it does wrong.

    Departures from the paper:
        None known.
    """

    card: ClassVar = replace(LoX.card, name="Edit")
    strength: ClassVar[str] = "share"
    base: str = ""
    share: float = 0.5
    fault: str = ""

    @property
    def mechanisms(self):
        return (LowRankEdit(k=1),) if self.share else ()

    def problems(self, model):
        found = LoX(base=self.base).problems(model)
        if self.fault == "takes any base":
            found = []
        if self.fault == "is blind to adapters":
            found = [problem for problem in found if problem.where != "adapter"]
        weak = [] if self.share or self.fault == "is silent" else [Problem("share", "share = 0 changes nothing")]
        return found + weak

    def edit(self, model, before: Stored) -> Mapping[str, float]:
        if self.fault == "leaves a flag":
            next(model.network.parameters()).requires_grad_(True)
        if self.fault == "runs the model":
            causal_lm(model.network)(input_ids=torch.tensor([[1, 2]]))
        if self.fault in {"does nothing", "takes any base"}:
            return {}
        for name, p in model.network.named_parameters():
            if p.ndim == 2 and (self.share or self.fault == "edits at 0"):
                by = torch.randn_like(p) if self.fault == "draws" else p - before[str(before.called([name]))]
                p.add_((self.share or 1e-3) * by)
        return {}


def test_an_honest_edit_keeps_the_contract():
    contract.check(Edit())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("does nothing", "changes no weight"),
        ("leaves a flag", "does not leave as found: requires_grad"),
        ("runs the model", "makes 1 forward passes"),
        ("draws", "draws from torch's global generator"),
        ("edits at 0", "with share = 0 changes weights"),
        ("is silent", "does not report it"),
        ("takes any base", "given no base: `problems` does not report"),
        ("is blind to adapters", "weights under an adapter"),
    ],
)
def test_a_broken_edit_is_found_out(fault, says):
    with pytest.raises(contract.ContractError, match=says):
        contract.check(Edit(fault=fault))


def test_an_edit_without_a_strength_is_asked_for_one():
    kind = type("Plain", (Edit,), {"strength": "", "__doc__": Edit.__doc__})
    found = next(check for check in contract.checks(kind()) if str(check) == "at_strength_0_it_changes_nothing")
    with pytest.raises(contract.ContractError, match="write `strength"):
        found()


def test_an_edit_reads_no_data_and_needs_nothing_trainable():
    method = LoX()
    assert method.reads == {}
    assert not method.trains
    model = tiny.language_model()
    model.network.requires_grad_(False)
    assert [problem.where for problem in method.problems(model)] == ["base"]
