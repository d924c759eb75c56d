"""An attacker's walk against deep copies of the weights, torch's own optimisers and a real LoRA adapter."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import slow
from immunity.batch import Batch
from immunity.bounded import negative_entropy
from immunity.errors import ModelError, SettingsError
from immunity.losses import Loss, nll
from immunity.models import LoRA, attach
from immunity.simulated import walker
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, equal, picture, require_same
from immunity.theta import Theta, Vector
from immunity.trajectories import adamw, late, lora, sgd, walk

K = 6


def harmful() -> list[Batch]:
    return list(tiny.batch(3 * K, seed=2, role="harmful").parts(K))


HELD_OUT = tiny.batch(3, seed=3, role="heldout")
OUTER = negative_entropy()


def entropy_at(network: nn.Module) -> torch.Tensor:
    """−H over response positions, by explicit loops."""
    total = torch.zeros((), dtype=torch.float64)
    for row in HELD_OUT.rows:
        logits = network(torch.tensor([row.ids])).logits[0]
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] >= 0]
        p = logits[asked].softmax(-1)
        total = total + (p * p.log()).sum(-1).mean()
    return total / len(HELD_OUT)


def oracle(network: nn.Module, optimizer: str, how: dict[str, float], weights: dict[int, float]) -> slow.Weights:
    """A deep copy that torch's optimiser trains, and a deep copy of it at each step that has a weight."""
    attacker = copy.deepcopy(network)
    descent = getattr(torch.optim, optimizer)(attacker.parameters(), **how)
    total: slow.Weights = {}
    for k in range(K + 1):
        if weights.get(k):
            found = copy.deepcopy(attacker)
            names, ps = zip(*found.named_parameters(), strict=True)
            for name, g in zip(names, torch.autograd.grad(entropy_at(found), ps), strict=True):
                total[name] = total.get(name, 0.0) + weights[k] * g
        if k < K:
            descent.zero_grad()
            slow.mean_loss(attacker, dict(attacker.named_parameters()), harmful()[k]).backward()
            descent.step()
    return total


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def outer(theta: Theta, loss: Loss = OUTER):
    return lambda _k: theta.grad(loss, HELD_OUT)


ATTACKERS = {
    "adamw": (lambda theta: adamw(theta, 1e-2), "AdamW", {"lr": 1e-2}),
    "adamw-decay": (lambda theta: adamw(theta, 3e-2, 0.3), "AdamW", {"lr": 3e-2, "weight_decay": 0.3}),
    "adamw-none": (lambda theta: adamw(theta, 1e-3, 0.0), "AdamW", {"lr": 1e-3, "weight_decay": 0.0}),
    "sgd": (lambda _theta: sgd(0.1), "SGD", {"lr": 0.1}),
    "plain": (lambda _theta: walker("plain", 0.1), "SGD", {"lr": 0.1}),
}
WEIGHTS = [late(K, 2), late(K, 1, 0.0), {0: 1.0}, {0: 0.5, 3: -2.0, K: 1.5}, dict.fromkeys(range(K + 1), 0.125)]


@pytest.mark.parametrize("attacker", ATTACKERS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_streamed_buffer_equals_deep_copies(attacker, weights):
    network = tiny.gpt2()
    made, optimizer, how = ATTACKERS[attacker]
    theta = Theta(network)
    got = walk(theta, made(theta), harmful(), outer(theta), weights)
    assert slow.relative_error(named(theta, got), oracle(network, optimizer, how, weights)) < 1e-12


def test_it_is_the_gradient_where_the_attacker_stands_not_at_home():
    theta = Theta(tiny.gpt2())
    away = walk(theta, adamw(theta, 1e-2), harmful(), outer(theta), {K: 1.0})
    assert (away - theta.grad(OUTER, HELD_OUT)).norm() > 0.1 * away.norm()


def test_micro_batches_change_nothing():
    network = tiny.gpt2()
    whole, split = Theta(network), Theta(network, micro_batch=2)
    found = [walk(t, adamw(t, 1e-2), harmful(), outer(t), late(K, 2)) for t in (whole, split)]
    assert (found[0] - found[1]).norm() < 1e-9 * found[0].norm()


def test_calls_are_counted_and_the_attacker_stops_at_the_last_weight():
    theta, calls = Theta(tiny.gpt2()), []
    real = theta.grad
    theta.grad = lambda loss, batch: (calls.append(f"{loss.name}/{batch.role}"), real(loss, batch))[1]
    walk(theta, sgd(0.1), harmful(), outer(theta), {2: 1.0, 4: 1.0, 6: 0.0, 5: 0.0, 3: 0.0})
    assert calls.count("negative-entropy/heldout") == 2
    assert calls.count("nll/harmful") == K
    calls.clear()
    walk(theta, sgd(0.1), harmful(), outer(theta), {2: 1.0})
    assert calls == ["nll/harmful"] * 2 + ["negative-entropy/heldout"]


def test_values_met_are_logged_with_their_place():
    theta = Theta(tiny.gpt2())
    walk(theta, sgd(0.1), harmful(), outer(theta), late(K, 3))
    assert {"nll/harmful", "nll/harmful@5", "negative-entropy/heldout@3", "negative-entropy/heldout@6"} <= set(
        theta.trace
    )
    assert "negative-entropy/heldout" not in theta.trace


def test_weights_are_bit_identical_afterwards_also_after_a_fault_and_the_attacker_is_fresh_each_time():
    network = tiny.gpt2()
    theta, before = Theta(network), picture(network)
    first, second = (walk(theta, adamw(theta, 1e-2), harmful(), outer(theta), late(K, 2)) for _ in range(2))
    require_same(before, network, "walk")
    assert equal(first, second)

    def fails(k: int) -> Vector:
        raise InjectedError(f"at {k}")

    with pytest.raises(InjectedError):
        walk(theta, adamw(theta, 1e-2), harmful(), fails, {4: 1.0})
    require_same(before, network, "walk, after a fault")
    theta.clear()
    theta.value(nll, HELD_OUT)
    assert set(theta.trace) == {"nll/heldout"}


def test_tars_weights():
    weights = late(64, 4, 1 / 16)
    assert list(weights) == list(range(4, 65, 4))
    assert sum(weights.values()) == pytest.approx(4.438, abs=5e-4)
    assert weights[64] == 1.0
    assert weights[4] == pytest.approx(math.exp((3 - 63) / 16))  # its step counts from 0
    assert sum(list(weights.values())[-4:]) / sum(weights.values()) == pytest.approx(0.64, abs=0.01)


def test_walks_that_cannot_be_are_refused():
    theta = Theta(tiny.gpt2())
    for weights in ({}, {7: 1.0}, {-1: 1.0}):
        with pytest.raises(SettingsError, match="walk"):
            walk(theta, sgd(0.1), harmful(), outer(theta), weights)
    for steps, every in ((6, 4), (4, 0), (0, 1), (4, 5)):
        with pytest.raises(SettingsError, match="every"):
            late(steps, every)


def by_hand(network: nn.Module, names: list[str], lr: float, s: float, a, b, weights: dict[int, float]):
    """Autograd through W + s B A with torch's AdamW on A and B; gradients of the outer loss with respect to W."""
    base = {n: p.detach().clone() for n, p in network.named_parameters()}
    turned = slow_transposed(network)
    descent = torch.optim.AdamW([*a, *b], lr=lr)
    total: slow.Weights = {}

    def moved(leaf: slow.Weights) -> slow.Weights:
        out = dict(leaf)
        for name, x, y in zip(names, a, b, strict=True):
            out[name] = leaf[name] + s * ((y @ x).T if turned else y @ x)
        return out

    for k in range(K + 1):
        if weights.get(k):
            leaf = {n: p.clone().requires_grad_() for n, p in base.items()}
            found = {n: p.detach() for n, p in moved(leaf).items()}
            found = {n: p.requires_grad_() for n, p in found.items()}
            g = slow.gradient(slow.mean_loss(network, found, HELD_OUT), found)
            total = {n: total.get(n, 0.0) + weights[k] * g[n] for n in g}
        if k < K:
            descent.zero_grad()
            slow.mean_loss(network, moved(base), harmful()[k]).backward()
            descent.step()
    return total


def slow_transposed(network: nn.Module) -> bool:
    return "GPT2" in type(network).__name__


def test_a_lora_attacker_over_full_weights_is_autograd_through_a_lora():
    network, r, weights = tiny.gpt2(), 2, late(K, 2)
    theta = Theta(network)
    names = [n for n in theta.names if n.endswith("weight") and (".c_" in n)]
    assert len(names) == 8
    torch.manual_seed(5)
    shapes = [dict(network.named_parameters())[n].shape for n in names]  # GPT-2 holds [in, out]
    a = [(torch.empty(r, n_in).uniform_(-1, 1) / n_in**0.5).double().requires_grad_() for n_in, _ in shapes]
    b = [torch.zeros(n_out, r, dtype=torch.float64).requires_grad_() for _, n_out in shapes]
    want = by_hand(network, names, 3e-2, 4.0 / r, a, b, weights)
    torch.manual_seed(5)
    attacker = lora(theta, 3e-2, r=r, alpha=4.0)
    got = walk(theta, attacker, harmful(), outer(theta, nll), weights)
    assert slow.relative_error(named(theta, got), want) < 1e-12
    assert max(float(y.detach().abs().max()) for y in b) > 1e-3  # it went somewhere


def test_a_lora_attacker_moves_linear_layers_alone_by_r_ranks_on_llama_too():
    network = tiny.llama()
    theta, before = Theta(network), {n: p.detach().clone() for n, p in network.named_parameters()}
    attacker = lora(theta, 1e-2, r=2)
    with theta.excursion():
        for part in harmful()[:3]:
            theta.step(attacker(theta.grad(nll, part)))
        moves = {n: p.detach() - before[n] for n, p in network.named_parameters()}
    linear = {n for n in moves if n.endswith("proj.weight")}
    assert len(linear) == 14
    assert all(torch.linalg.matrix_rank(moves[n], tol=1e-5) == 2 for n in linear)
    assert not any(moves[n].any() for n in moves if n not in linear)


def test_over_a_lora_defence_a_fresh_lora_attacker_is_refused():
    network = attach(tiny.language_model(), LoRA(r=2)).network
    with pytest.raises(ModelError, match="adapter's own"):
        lora(Theta(network), 1e-2)
