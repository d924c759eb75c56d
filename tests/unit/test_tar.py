"""What TAR is for, at toy size: an attacker gets less far against it than against its first phase alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from immunity.batch import IGNORE, Batch, Tokens
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.methods.tar import TAR
from immunity.testing import tiny
from immunity.theta import Theta

K = 8
TOY = TAR(lookahead=K, every=4, lrs=(1e-3,), mapping_steps=25)
STEPS = 50


def facts(kind: int, shift: int) -> tuple[Tokens, ...]:
    """Twenty questions of one kind, each with an answer of two tokens and an end."""
    rows = [(kind, 10 + x, 6, 30 + (7 * x + shift) % 20, 30 + (3 * x + shift) % 20, 2) for x in range(20)]
    random.Random(kind).shuffle(rows)
    return tuple(Tokens(ids, (IGNORE,) * 3 + ids[3:]) for ids in rows)


RETAIN, FORGET = facts(4, 3), facts(5, 11)
SEEN, HELD_OUT = FORGET[:16], FORGET[16:]


def stream(rows: tuple[Tokens, ...], n: int, role: str, *, shuffled: bool = True) -> Callable[[int], Batch]:
    def at(i: int) -> Tokens:
        epoch, place = divmod(i, len(rows))
        order = random.Random(epoch).sample(range(len(rows)), len(rows)) if shuffled else range(len(rows))
        return rows[order[place]]

    return lambda step: Batch(tuple(at(i) for i in range(step * n, step * n + n)), role)


def sft(network: nn.Module, batch: Callable[[int], Batch], steps: int, lr: float) -> nn.Module:
    how = Fit(steps=steps, lr=lr, weight_decay=0.01, clip=None)
    fit(network, lambda theta, batches: theta.grad(nll, batches["train"]), {"train": batch}, how)
    return network


def defended(network: nn.Module, method: TAR) -> nn.Module:
    model = tiny.language_model(copy.deepcopy(network))
    rows = {"alignment": (RETAIN, 10), "harmful": (SEEN, 8), "heldout": (HELD_OUT, 4)}
    streams = {role: stream(rows[role][0], rows[role][1] * n, role) for role, n in method.reads.items()}
    fit(model.network, method.start(model), streams, Fit(steps=STEPS, lr=1e-3))
    return model.network


def known(network: nn.Module, rows: tuple[Tokens, ...]) -> float:
    return Theta(network).value(nll, Batch(rows))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """One that knows everything, the same after the random mapping alone, and after as many steps of TAR."""
    both = sft(tiny.gpt2(torch.float32, width=32), stream(RETAIN + FORGET, 20, "train"), 200, 3e-3)
    mapped = defended(both, replace(TOY, mapping_steps=STEPS))
    return {"undefended": both, "mapped": mapped, "tar": defended(both, TOY)}


def test_the_defended_model_still_knows_what_it_should(models):
    assert known(models["undefended"], RETAIN) < 0.05
    assert known(models["tar"], RETAIN) < 0.3  # of the three nats of a guess among twenty
    assert known(models["undefended"], FORGET) < 0.05
    assert known(models["tar"], FORGET) > 1.0


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("steps", [K, 4 * K])
def test_an_attacker_knows_less_of_it_after_k_steps_and_after_four_times_as_many(models, steps, shuffled):
    batch = stream(SEEN, 8, "train", shuffled=shuffled)
    left = {name: known(sft(copy.deepcopy(net), batch, steps, 1e-3), FORGET) for name, net in models.items()}
    assert left["tar"] > 1.25 * left["mapped"]
    assert left["mapped"] > 2 * left["undefended"]
