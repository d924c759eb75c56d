"""LAPT against a transcription of its equations: row by row, unpadded, with noise that is given."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

import slow
from immunity import noise
from immunity.batch import IGNORE
from immunity.hidden import Site
from immunity.losses import nll
from immunity.methods.lapt import LAPT, Patching
from immunity.testing import tiny
from immunity.theta import Theta

SAFE, HARMFUL = tiny.batch(3, seed=1, role="safe"), tiny.batch(3, seed=4, role="harmful")
TABLE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""δ at each position, the same for every row."""


@pytest.fixture(autouse=True)
def given(monkeypatch):
    def drawn(batch, _seed, _place, h, _apart):
        return TABLE[: h.shape[1]].expand(len(batch), -1, -1)

    monkeypatch.setattr(noise, "_drawn", drawn)


def loss_of_row(network, at, row, layer, how):
    """−mean log p of the response, its states at the block's end disturbed by c (μ(h) + σ(h) (δ − μ(δ)) / σ(δ))."""
    ids = torch.tensor([row.ids])
    states = {}

    def look(_module, args, output):
        states["input"], states["output"] = args[0][0].detach(), output[0].detach()

    block = network.transformer.h[layer]
    handle = block.register_forward_hook(look)
    functional_call(network, at, (ids,))
    handle.remove()
    h, asked = states[how.like], [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    where = [t - 1 for t in asked] if how.positions == "predicting" else asked
    added = torch.zeros_like(h)
    for t in where:
        delta = TABLE[t]
        unit = (delta - delta.sum() / 16) / math.sqrt(float(((delta - delta.mean()) ** 2).sum() / 15))
        sigma = math.sqrt(float(((h[t] - h[t].mean()) ** 2).sum() / 15))
        added[t] = how.alpha * (h[t].mean() + sigma * unit)
    handle = block.register_forward_hook(lambda _m, _a, output: output + added)
    try:
        logits = functional_call(network, at, (ids,)).logits[0]
    finally:
        handle.remove()
    return -sum(torch.log_softmax(logits[t - 1], -1)[row.ids[t]] for t in asked) / len(asked)


def mean(network, at, batch, layer, how):
    return sum(loss_of_row(network, at, row, layer, how) for row in batch.rows) / len(batch)


@pytest.mark.parametrize(
    "how",
    [
        LAPT(layers="0"),
        LAPT(layers="1"),
        LAPT(layers="0", positions="response", like="input"),
        LAPT(layers="1", alpha=0.5, like="input"),
    ],
    ids=str,
)
def test_the_direction_is_the_gradient_of_the_disturbed_loss(how):
    network = tiny.gpt2()
    theta = Theta(network)
    found = Patching(how, 2, None)(theta, {"safe": SAFE})
    at = slow.weights(network)
    wanted = slow.gradient(mean(network, at, SAFE, int(how.layers), how), at)
    assert slow.relative_error(dict(zip(theta.names, found.tensors(), strict=True)), wanted) < 1e-8


@pytest.mark.parametrize("layer", [0, 1])
def test_central_differences_of_it_with_the_noise_held_still(layer):
    """At a few weights: the noise is a constant, though it is as large as what the weights make of the input."""
    network, how = tiny.gpt2(), LAPT(layers=str(layer))
    theta = Theta(network)
    found = Patching(how, 2, None)(theta, {"safe": SAFE})
    direction = found.unit()
    place = Site(layer, "output")
    kept = {}

    def still(inner, batch):
        h = {}
        handle = inner.transformer.h[layer].register_forward_hook(lambda _m, _a, out: h.update(out=out))
        inner(batch.padded().input_ids, attention_mask=batch.padded().attention_mask)
        handle.remove()
        here = noise.chosen(batch.padded(), how.positions)[..., None]
        drawn = TABLE[: h["out"].shape[1]].expand_as(h["out"])
        return {place: torch.where(here, noise._as_large(h["out"], drawn), 0).detach()}

    with torch.no_grad():
        kept = still(network, SAFE)
    loss = noise.perturbed(nll, lambda _n, _b: kept, name="still", coupled=False)
    ends = []
    for sign in (1.0, -1.0):
        with theta.moved(sign * 1e-5 * direction):
            ends.append(theta.value(loss, SAFE))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(found.norm(), rel=1e-4)


def test_a_block_s_fragility_is_how_much_likelier_noise_makes_the_compliant_answer():
    network, how = tiny.gpt2(), LAPT()
    at = slow.weights(network)

    def broken(layer, alpha):
        settings = LAPT(alpha=alpha)
        apart = [
            loss_of_row(network, at, harmful, layer, settings) - loss_of_row(network, at, safe, layer, settings)
            for safe, harmful in zip(SAFE.rows, HARMFUL.rows, strict=True)
        ]
        return sum(1.0 / (1.0 + math.exp(margin.item())) for margin in apart) / len(apart)

    wanted = [max(0.0, broken(layer, 1.0) - broken(layer, 0.0)) for layer in (0, 1)]
    assert any(wanted), "or this shows nothing: take other rows"
    patching = Patching(how, 2, (SAFE, HARMFUL))
    theta = Theta(network)
    patching(theta, {"safe": SAFE})
    assert patching.odds == pytest.approx(wanted, abs=1e-12)
    assert [theta.trace[f"fragility/{layer}"] for layer in (0, 1)] == patching.odds


def test_without_noise_it_is_sft_on_safe_answers_bit_for_bit():
    theta = Theta(tiny.gpt2())
    found, plain = Patching(LAPT(alpha=0.0, layers="all"), 2, None)(theta, {"safe": SAFE}), theta.grad(nll, SAFE)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), plain.tensors(), strict=True))
