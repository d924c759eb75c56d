"""Patches: how long they may be beside the weights, of what rank and where; their gradient; and the whole attack."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from immunity.attacks.attack import Opening
from immunity.attacks.curve import Recorder
from immunity.attacks.patch import LowRankPatch
from immunity.attacks.restricted import tokens
from immunity.batch import Batch
from immunity.errors import DataError, SettingsError
from immunity.losses import nll
from immunity.models import load, save
from immunity.patches import sizes
from immunity.testing import tiny
from immunity.testing.check_attack import Seen
from immunity.testing.watch import InjectedError, corpus
from immunity.theta import Theta

DATA = {"harmful": corpus("harmful", 12)}
ATTACK = LowRankPatch(n=8, rank=3, radius=0.2, steps=24, batch_size=4)
BATCH = tiny.batch(6)


class Looks:
    def __init__(self, model):
        self.batch = Batch(tokens(model, DATA).rows, "harmful")
        self.seen = []

    def __call__(self, model):
        self.seen.append({name: p.detach().clone() for name, p in model.network.named_parameters()})
        with torch.no_grad():
            return Seen({"nll": float(nll(model.network, self.batch).mean())}, {}, {}, [])


def run(attack):
    """The NLL at every budget, and name of a weight -> how it was changed in the end, beside its length."""
    model = tiny.language_model()
    looks = Looks(model)
    recorder = Recorder(measure=looks, at=attack.budgets)
    after = attack.tamper(model, attack.reads(DATA), recorder)
    assert all(torch.equal(looks.seen[-1][name], p) for name, p in after.network.named_parameters())
    first, last = looks.seen[0], looks.seen[-1]
    changed = {name: (last[name] - first[name]) / first[name].norm() for name in first}
    return [point.metrics["nll"] for point in recorder.points], {n: d for n, d in changed.items() if d.any()}


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_patch_has_the_rank_and_the_place_that_were_said_and_is_no_longer_than_may_be(targets):
    values, changed = run(replace(ATTACK, targets=targets, lr=0.2))
    assert values[-1] < values[0] - 0.3
    layers = sizes(tiny.llama(), targets)
    assert set(changed) == {f"{layer}.weight" for layer in layers}
    lengths = [float(change.norm()) for change in changed.values()]
    assert max(lengths) <= 0.2 * (1 + 1e-5)
    assert max(lengths) > 0.2 * (1 - 1e-3), "the cap is reached, so it was there that it stopped"
    for change in changed.values():
        singular = torch.linalg.svdvals(change.double())
        assert singular[3] < 1e-5 * singular[0] < singular[2]


def test_a_larger_radius_goes_farther_than_a_smaller_one_may():
    far = run(replace(ATTACK, radius=1.0, lr=0.2))[1]
    assert all(float(change.norm()) > 0.2 for change in far.values())


@pytest.mark.parametrize("scale", [0.3, 40.0], ids=["inside", "at the cap"])
def test_the_gradient_is_the_slope_of_the_loss(scale):
    """By finite differences in float64, inside the ball and on its border; GPT-2 holds weights the other way round."""
    network = tiny.gpt2()
    coordinates = ATTACK.coordinates(SimpleNamespace(network=network), {})
    names = list(coordinates.trainable)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in coordinates.trainable.values():
            p.add_(scale * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    theta = Theta(network, trainable=coordinates.trainable)
    found = coordinates(theta, {"train": BATCH})
    assert theta.names == names
    way = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in theta.parameters]
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for p, by in zip(theta.parameters, way, strict=True):
                p.add_(step * by)
            coordinates.put()
            values.append(float(nll(network, BATCH).mean()))
            for p, by in zip(theta.parameters, way, strict=True):
                p.sub_(step * by)
    slope = sum(float((g * by).sum()) for g, by in zip(found.tensors(), way, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert theta.trace.keys() == {"nll/train"}


def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    save(tiny.language_model(), tmp_path / "model")
    opening = Opening(source=str(tmp_path / "model"), device="cpu")
    looks = Looks(load(str(tmp_path / "model"), device="cpu"))
    whole = ATTACK.run(opening, DATA, looks)
    weights = looks.seen[-1]

    def stop(done, trace):
        if done == 23:  # a checkpoint is at 20
            raise InjectedError("injected")

    with pytest.raises(InjectedError):
        ATTACK.run(opening, DATA, looks, folder=tmp_path / "cut", observe=stop)
    again = ATTACK.run(opening, DATA, looks, folder=tmp_path / "cut")
    assert [(p.step, p.metrics) for p in again.points] == [(p.step, p.metrics) for p in whole.points]
    assert all(torch.equal(weights[name], looks.seen[-1][name]) for name in weights)


def test_settings_and_data_are_looked_at():
    for name, wrong in {"radius": 0.0, "rank": 0, "targets": "head", "lr": -1.0, "n": 0}.items():
        with pytest.raises(SettingsError, match=name):
            LowRankPatch(**{name: wrong})
    with pytest.raises(SettingsError, match="radius"):
        LowRankPatch(radius=math.inf)
    with pytest.raises(DataError, match="harmful"):
        ATTACK.reads({})
    assert ATTACK.threat.name == "harmful"
