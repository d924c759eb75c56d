"""E.T. against a transcription of its two losses: one unpadded row at a time, weights written out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import slow
from immunity.batch import IGNORE
from immunity.blockwise import Block, LowRank, prompts
from immunity.hidden import Site
from immunity.interventions import low_rank
from immunity.losses import nll
from immunity.testing import tiny
from immunity.theta import Theta
from immunity.transforms import edited

BATCH = tiny.batch(4, seed=3, role="harmful", lengths=(6, 14))
RANK, WIDTH = 2, 16
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def intervention(seed=0):
    return 0.3 * drawn(RANK, WIDTH, seed=seed), 0.3 * drawn(RANK, WIDTH, seed=seed + 100)


def phi(h, w1, w2):
    """h + Σ_k w2_k ⟨w1_k, h⟩, position by position."""
    return torch.stack([h[t] + sum(w2[k] * (w1[k] * h[t]).sum() for k in range(RANK)) for t in range(len(h))])


def length(row):
    """Tokens of the prompt."""
    return next(t for t in range(len(row.ids)) if row.labels[t] != IGNORE)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_intervention_s_gradient(layer):
    """∇ℓ(θ; h_l at prompt positions ← φ(h_l)) with respect to W₁ and W₂."""
    network = tiny.gpt2()
    w1, w2 = (nn.Parameter(w) for w in intervention())
    loss = edited(nll, {Site(layer, "input"): low_rank(w1, w2, torch.zeros(RANK, dtype=torch.float64))}, "prompt")
    theta = Theta(network, trainable={"w1": w1, "w2": w2})
    found = dict(zip(theta.names, theta.grad(loss, BATCH).tensors(), strict=True))

    at = {"w1": w1.detach().clone().requires_grad_(), "w2": w2.detach().clone().requires_grad_()}
    total = torch.zeros((), dtype=torch.float64)
    for row in BATCH.rows:
        n = length(row)

        def act(_module, args, n=n):
            h = args[0]
            return (torch.cat([phi(h[0, :n], at["w1"], at["w2"])[None], h[:, n:]], dim=1), *args[1:])

        handle = network.transformer.h[layer].register_forward_pre_hook(act)
        logits = network(torch.tensor([row.ids])).logits[0]
        handle.remove()
        terms = [torch.log_softmax(logits[t - 1], -1)[row.ids[t]] for t in range(n, len(row.ids))]
        total = total - sum(terms) / len(terms) / len(BATCH)
    assert slow.relative_error(found, slow.gradient(total, at)) < 1e-8


def made_of(network, layer, states, delta=None):
    """(attention, MLP) of a block for the states [T, D] of one row; delta: name -> what is added to W, [in, out]."""
    block = network.transformer.h[layer]
    weights = dict(block.named_parameters())
    for name, added in (delta or {}).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + added
    seen = {}
    handles = [
        block.attn.register_forward_hook(lambda _m, _a, out: seen.update(attention=out[0][0])),
        block.mlp.register_forward_hook(lambda _m, _a, out: seen.update(mlp=out[0])),
    ]
    try:
        ahead = torch.full((len(states), len(states)), float("-inf"), dtype=torch.float64).triu(1)
        functional_call(block, weights, (states[None],), {"attention_mask": ahead[None, None]})
    finally:
        for handle in handles:
            handle.remove()
    return seen["attention"], seen["mlp"]


def entered(network, layer, row):
    seen = {}
    handle = network.transformer.h[layer].register_forward_pre_hook(lambda _m, args: seen.update(h=args[0][0].detach()))
    network(torch.tensor([row.ids]))
    handle.remove()
    return seen["h"]


def neutral(network, layer, batch, attacks, reg, delta):
    """Σ_m MSE(m_{θ+Δ}(h + i), m_θ(h)) + λ Σ_m MSE(m_{θ+Δ}(h), m_θ(h)), a mean over attacks; mean over rows."""
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        n = length(row)
        h = entered(network, layer, row)[:n]
        clean = [out.detach() for out in made_of(network, layer, h)]

        def off(states, clean=clean):
            now = made_of(network, layer, states, delta)
            return sum(((a - b) ** 2).mean() for a, b in zip(now, clean, strict=True))

        through = sum(off(phi(h, *attack)) for attack in attacks) / len(attacks)
        total = total + (through + reg * off(h)) / len(batch)
    return total


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_defence_s_gradient(layer, micro_batch):
    network, reg, rows = tiny.gpt2(), 0.3, prompts(BATCH)
    attacks = [intervention(seed) for seed in (0, 1)]
    torch.manual_seed(0)
    low = LowRank(network, layer, RANK)
    with torch.no_grad():
        for p in low.factors.values():
            p.add_(0.1 * drawn(*p.shape, seed=7))
    block = Block(network, layer)
    theta = Theta(network, trainable=low.factors, micro_batch=micro_batch)
    block.keep(theta, rows)
    none = torch.zeros(RANK, dtype=torch.float64)
    loss = block.neutral([low_rank(*attack, none) for attack in attacks], reg, low.patches)
    found = dict(zip(theta.names, theta.grad(loss, rows).tensors(), strict=True))

    at = {name: p.detach().clone().requires_grad_() for name, p in low.factors.items()}
    prefix = f"transformer.h.{layer}."
    delta = {name: (at[f"{prefix}{name}.v"][0] @ at[f"{prefix}{name}.u"][0]).T for name in LINEAR}
    wanted = neutral(network, layer, BATCH, attacks, reg, delta)
    assert theta.trace["neutral/harmful"] == pytest.approx(wanted.item(), rel=1e-10)
    assert slow.relative_error(found, slow.gradient(wanted, at)) < 1e-8


def test_the_defence_s_gradient_by_central_differences():
    network, rows = tiny.gpt2(), prompts(BATCH)
    torch.manual_seed(0)
    low = LowRank(network, 1, RANK)
    with torch.no_grad():
        for p in low.factors.values():
            p.add_(0.1 * drawn(*p.shape, seed=7))
    theta, block = Theta(network, trainable=low.factors), Block(network, 1)
    block.keep(theta, rows)
    edit = low_rank(*intervention(), torch.zeros(RANK, dtype=torch.float64))
    loss = block.neutral([edit], 0.3, low.patches)
    found, ends = theta.grad(loss, rows), []
    for sign in (1.0, -1.0):
        with theta.moved(sign * 1e-5 * found.unit()):
            ends.append(theta.value(loss, rows))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(found.norm(), rel=1e-4)
