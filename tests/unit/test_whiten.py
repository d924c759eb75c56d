"""Whitening: what one step does in closed form, on a linear probe and inside a language model; and the whole attack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from immunity.attacks.attack import Opening
from immunity.attacks.coordinates import Coordinates, name_of
from immunity.attacks.curve import Recorder
from immunity.attacks.finetune import FineTune
from immunity.attacks.restricted import tokens
from immunity.attacks.whiten import Whiten, moments, whitened, whitening
from immunity.batch import Batch
from immunity.errors import DataError, ModelError, SettingsError
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.models import load, save
from immunity.testing import tiny
from immunity.testing.check_attack import Seen
from immunity.testing.watch import InjectedError, corpus
from immunity.theta import Theta

DATA = {"harmful": corpus("harmful", 12)}
ATTACK = Whiten(n=8, steps=24, batch_size=4, lr=1e-3)
MODELS = {
    "gpt2": tiny.gpt2,
    "llama": lambda: tiny.llama().double(),
    "tied llama": lambda: tiny.llama(tied=True).double(),
}
BATCH = tiny.batch(12)


def probe(n=64, d=6, spread=1e3, seed=0):
    """Inputs whose second moments have the condition number ``spread``, and what a linear map makes of them."""
    draw = torch.Generator().manual_seed(seed)
    white, _ = torch.linalg.qr(torch.randn(n, d, generator=draw, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    x = white * n**0.5 * torch.logspace(0, 0.5 * torch.log10(torch.tensor(spread)).item(), d).double() @ turn
    right = torch.randn(3, d, generator=draw, dtype=torch.float64)
    return x, right


# In closed form


@given(st.integers(1, 9), st.floats(1e-6, 10.0), st.integers(0, 99), st.floats(0.1, 100.0))
def test_white_inputs_are_as_long_as_inputs_were(d, ridge, seed, size):
    x = size * torch.randn(20, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = x.T @ x / len(x)
    m = whitening(s, ridge)
    assert torch.allclose(m, m.T, atol=1e-9)
    assert float((m @ s @ m).trace()) == pytest.approx(float(s.trace()))
    inverse = torch.linalg.inv(s + ridge * s.trace() / d * torch.eye(d))
    scale = float((m @ m).trace() / inverse.trace())
    assert torch.allclose(m @ m, scale * inverse, rtol=1e-6, atol=1e-8 * scale)


def test_small_ridges_whiten_and_large_ones_do_nothing():
    x, _ = probe()
    s = x.T @ x / len(x)
    m = whitening(s, 1e-12)
    white = m @ s @ m
    assert torch.allclose(white, white[0, 0] * torch.eye(len(s)).double(), atol=1e-6 * float(white[0, 0]))
    assert torch.allclose(whitening(s, 1e9), torch.eye(len(s)).double(), atol=1e-6)
    assert torch.equal(whitening(torch.zeros(3, 3), 0.1), torch.eye(3))


def test_one_step_solves_a_probe_that_plain_descent_solves_in_as_many_as_its_condition_number():
    x, right = probe(spread=1e3)
    n, s = len(x), x.T @ x / len(x)
    kappa = float(torch.linalg.cond(s))
    assert kappa == pytest.approx(1e3, rel=1e-3)

    def gradient(w):
        return (x @ w.T - x @ right.T).T @ x / n

    m = whitening(s, 1e-12)
    start = torch.zeros_like(right)
    rate = len(s) / float((m @ m @ s).trace())  # M² is a multiple of S⁻¹: one over that
    assert torch.allclose(start - rate * gradient(start) @ m @ m, right, atol=1e-6)
    values = torch.linalg.eigvalsh(s)
    best, w, taken = float(2 / (values[0] + values[-1])), start, 0
    while float((w - right).norm() / right.norm()) > 1e-2:
        w, taken = w - best * gradient(w), taken + 1
    assert taken > kappa / 2


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_the_plain_one_times_the_inverse_of_the_second_moments(kind):
    """Against hooks and an inverse of our own; GPT-2's projection is square, and held the other way round."""
    network, batch, ridge = MODELS[kind](), BATCH, 0.03
    plain = Theta(network)
    g = dict(zip(plain.names, plain.grad(nll, batch).tensors(), strict=True))
    given_to = inputs(network, batch)
    expected = {}
    for layer, x in given_to.items():
        s = x.T @ x / len(x)
        inverse = torch.linalg.inv(s + ridge * s.trace() / len(s) * torch.eye(len(s)).double())
        inverse *= s.trace() / (inverse @ s).trace()  # white inputs are as long as inputs were
        name = name_of(network, layer)
        conv = not isinstance(layer, nn.Linear)
        expected[name] = (g[name].T @ inverse).T if conv else g[name] @ inverse
    coordinates = whitened(network, [batch], ridge)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    fit(network, coordinates, {"train": lambda _: batch}, Fit(steps=1, lr=0.5, optimizer="sgd", clip=None),
        trainable=coordinates.trainable)  # fmt: skip
    coordinates.put()
    assert len(expected) == len(given_to) == {"gpt2": 9, "llama": 15, "tied llama": 15}[kind]
    for name, p in network.named_parameters():
        way = expected.get(name, g[name])
        assert torch.allclose(p.detach() - before[name], -0.5 * way, rtol=1e-9, atol=1e-12), name


def inputs(network, batch):
    """What each linear layer and the head are given where an answer is predicted, by plain hooks."""
    seen = {}

    def keep(layer, args):
        seen[layer] = args[0].detach()

    layers = [m for m in network.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    padded = batch.padded()
    with torch.no_grad():
        network(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    predicting = padded.labels[:, 1:] != -100
    return {layer: x[:, :-1][predicting] for layer, x in seen.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_moments_do_not_depend_on_how_rows_are_batched(kind):
    network = MODELS[kind]()
    whole, parts = moments(network, [BATCH]), moments(network, list(BATCH.split(3)))
    assert [len(layers) for layers, _ in whole] == [len(layers) for layers, _ in parts]
    for (_, a), (_, b) in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    if kind == "llama":  # queries, keys and values are given the same; gate and up, too
        assert sorted({len(layers) for layers, _ in whole}) == [1, 2, 3]


# The attack


class Looks:
    def __init__(self, model):
        self.batch = Batch(tokens(model, DATA).rows, "harmful")
        self.last = None

    def __call__(self, model):
        self.last = {name: p.detach().clone() for name, p in model.network.named_parameters()}
        with torch.no_grad():
            return Seen({"nll": float(nll(model.network, self.batch).mean())}, {}, {}, [])


def run(attack):
    model = tiny.language_model()
    model.network.requires_grad_(False)
    looks = Looks(model)
    recorder = Recorder(measure=looks, at=attack.budgets)
    after = attack.tamper(model, attack.reads(DATA), recorder)
    assert all(torch.equal(looks.last[name], p) for name, p in after.network.named_parameters())
    return [point.metrics["nll"] for point in recorder.points], recorder.points


@pytest.mark.parametrize("attack", [ATTACK, replace(ATTACK, optimizer="sgd", lr=0.05, momentum=0.5)])
def test_restricted_answers_become_likelier(attack):
    values, points = run(attack)
    assert values[-1] < values[0] - 0.5
    assert [point.step for point in points] == list(attack.budgets)
    assert points[-1].examples == 24 * 4
    assert points[-1].flops > 0


def test_with_a_huge_ridge_it_is_the_plain_fine_tune():
    attack = replace(ATTACK, ridge=1e12, steps=4)
    model = tiny.language_model()
    looks = Looks(model)
    plain = attack.plain()
    assert plain == FineTune(n=8, steps=4, batch_size=4, lr=1e-3)
    recorder = Recorder(measure=looks, at=plain.budgets)
    plain.tamper(model, plain.reads(DATA), recorder)
    assert run(attack)[0] == pytest.approx([point.metrics["nll"] for point in recorder.points], abs=1e-3)
    assert run(replace(attack, ridge=0.01))[0] != pytest.approx([p.metrics["nll"] for p in recorder.points], abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "schedulefree"])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, optimizer):
    if optimizer == "schedulefree":
        pytest.importorskip("schedulefree")
    attack = replace(ATTACK, optimizer=optimizer)
    save(tiny.language_model(), tmp_path / "model")
    opening = Opening(source=str(tmp_path / "model"), device="cpu")
    looks = Looks(load(str(tmp_path / "model"), device="cpu"))
    whole = attack.run(opening, DATA, looks, folder=tmp_path / "whole")
    weights = looks.last

    def stop(done, trace):
        if done == 23:  # a checkpoint is at 20
            raise InjectedError("injected")

    with pytest.raises(InjectedError):
        attack.run(opening, DATA, looks, folder=tmp_path / "cut", observe=stop)
    again = attack.run(opening, DATA, looks, folder=tmp_path / "cut")
    assert [(p.step, p.metrics) for p in again.points] == [(p.step, p.metrics) for p in whole.points]
    assert all(torch.equal(weights[name], looks.last[name]) for name in weights)


def test_settings_and_data_are_looked_at():
    for wrong in ({"ridge": 0.0}, {"ridge": float("inf")}, {"n": 0}, {"lr": 0.0}, {"optimizer": "nesterov"}):
        with pytest.raises(SettingsError, match=next(iter(wrong)) if "optimizer" not in wrong else "momentum"):
            Whiten(**wrong)
    with pytest.raises(DataError, match="harmful"):
        ATTACK.reads({})
    assert len(ATTACK.reads({"harmful": corpus("harmful", 3)})["harmful"]) == 3
    assert ATTACK.threat.name == "harmful"


def test_coordinates_are_those_of_trainable_matrices():
    network = tiny.llama()
    with pytest.raises(ModelError, match="nothing"):
        Coordinates(network, {"nothing.weight": None})
