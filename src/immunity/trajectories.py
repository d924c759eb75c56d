"""A simulated attacker's walk, and the gradients met on it, summed in one buffer.

    theta_k = theta + k steps of an attacker,      walk(...) = Σ_k w_k ∇outer(theta_k)

The gradients are first order: each is taken at theta_k and meant to be applied at theta. They are added up while the
attacker walks in place, so memory does not depend on the number of steps, and the result is that of keeping a deep copy
of the weights for every theta_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.losses import Loss, causal_lm, nll
from immunity.networks import linear_layers, transposed_linear
from immunity.simulated import BETA1, BETA2, Walker
from immunity.theta import Theta, Vector

Outer = Callable[[int], Vector]
"""How many steps the attacker has taken -> a gradient at the point where theta stands then."""

DECAY: Final = 0.01
"""PyTorch's default weight decay of AdamW, which a simulated attacker has who sets nothing."""
_EPS: Final = 1e-8


def walk(
    theta: Theta,
    attacker: Walker,
    batches: Sequence[Batch],
    outer: Outer,
    weights: Mapping[int, float],
    *,
    loss: Loss = nll,
) -> Vector:
    """Σ_k w_k · outer(k), each taken where the attacker is after k steps; theta is home again afterwards.

    Costs, beside what the attacker remembers, one copy of the trainable weights and one buffer of their size.

    Args:
        theta: Where the attacker starts.
        attacker: A fresh one (:func:`adamw`, :func:`lora`, :func:`~immunity.simulated.walker`), or one of your own.
        batches: What it trains on, one batch for each step.
        outer: Asked at the steps of ``weights`` that are not 0, in rising order.
        weights: Steps taken -> w; 0 is theta itself. The attacker stops at the last of them.
        loss: What the attacker descends.

    Raises:
        SettingsError: No weight is given, or one for a step that the batches do not reach.
    """
    if not weights or min(weights) < 0 or max(weights) > len(batches):
        raise SettingsError(
            f"weights for the steps {sorted(weights)} of a walk of {len(batches)} batches: name steps from 0 to that"
        )
    last = max(weights)
    total = [torch.zeros_like(p) for p in theta.parameters]
    with theta.excursion():
        for k in range(last + 1):
            if weights.get(k, 0.0) != 0.0:
                met = outer(k)
                torch._foreach_add_(total, met.raw, alpha=weights[k] * met.scale)
            if k < last:
                theta.step(attacker(theta.grad(loss, batches[k])))
    return Vector(total)


def late(steps: int, every: int, rate: float = 1 / 16) -> dict[int, float]:
    """TAR's weights: exp(rate · (k − steps)) after every ``every``-th of ``steps`` steps, not normalised.

    With 64, 4 and 1/16 these are 16 weights whose sum is 4.438; the last four carry 64 % of it. A rate of 0 weights all
    alike, with 1.

    Raises:
        SettingsError: ``every`` does not divide ``steps``.
    """
    if every < 1 or steps < 1 or steps % every:
        raise SettingsError(f"every = {every} does not divide the {steps} steps of the walk: the last must be measured")
    return {k: math.exp(rate * (k - steps)) for k in range(every, steps + 1, every)}


def switched(restricted: Sequence[Batch], retain: Sequence[Batch], chance: float) -> list[Batch]:
    """What one attacker trains on, a batch for each step: restricted rows, or at first retain data and then those.

    The second kind comes with the given chance and switches after M = ⌊Beta(6, 3) · K⌋ of its K steps, two thirds on
    average (TAR). Drawn from torch's global generator, which ``fit`` seeds at every step.

    Args:
        restricted: One batch for each step.
        retain: Gone round until the switch; without any there is none.
        chance: From 0 to 1.
    """
    before = 0
    if retain and float(torch.rand(())) < chance:
        before = int(float(torch.distributions.Beta(6.0, 3.0).sample()) * len(restricted))
    return [retain[k % len(retain)] if k < before else part for k, part in enumerate(restricted)]


def adamw(theta: Theta, lr: float, weight_decay: float = DECAY) -> Walker:
    """A fresh attacker with PyTorch's AdamW (β .9, .999, ε 1e-8) at a constant rate: the step itself, not rescaled.

    Holds two copies of the trainable weights.
    """
    return _AdamW(theta.parameters, lr, weight_decay)


def sgd(lr: float) -> Walker:
    """An attacker with plain gradient descent; it remembers nothing."""
    return lambda g: -lr * g


def lora(theta: Theta, lr: float, *, r: int = 8, alpha: float | None = None, weight_decay: float = DECAY) -> Walker:
    """A fresh attacker who trains a LoRA adapter (by AdamW) over a model whose *full* weights are the coordinates.

    W moves by (α/r)(B A), and nothing else moves; from the gradient g at the moved W the adapter's own are (α/r) Bᵀ g
    and (α/r) g Aᵀ. So this is a LoRA fine-tune exactly, with no module touched, and the gradient that is met on the way
    is the one that flows to the base weights at W + (α/r) B A. What it costs is the full gradient in every step.

    Args:
        theta: Its coordinates must be the weights of linear layers, among others.
        lr: Of AdamW.
        r: Rank.
        alpha: α; None is 2 r.
        weight_decay: Of A and B.

    Raises:
        ModelError: No linear layer's weight is a coordinate (the model trains an adapter itself).
    """
    return _LoRA(theta, lr, r, 2.0 * r if alpha is None else alpha, weight_decay)


@final
class _AdamW:
    """PyTorch's AdamW as a displacement. It looks at the parameters, because the decay is of them."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self._parameters = list(parameters)
        self._lr, self._decay, self._steps = lr, weight_decay, 0
        self._first = [torch.zeros_like(p) for p in self._parameters]
        self._second = [torch.zeros_like(p) for p in self._parameters]

    def __call__(self, g: Vector) -> Vector:
        return Vector(self.displaced(g.tensors()))

    @torch.no_grad()
    def displaced(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """−lr · (m̂ / (√v̂ + ε) + decay · p), and the moments moved on."""
        grads = list(grads)
        self._steps += 1
        torch._foreach_lerp_(self._first, grads, 1 - BETA1)
        torch._foreach_mul_(self._second, BETA2)
        torch._foreach_addcmul_(self._second, grads, grads, 1 - BETA2)
        below = list(torch._foreach_sqrt(self._second))
        torch._foreach_div_(below, math.sqrt(1 - BETA2**self._steps))
        torch._foreach_add_(below, _EPS)
        moves = list(torch._foreach_mul(self._parameters, -self._lr * self._decay))
        torch._foreach_addcdiv_(moves, self._first, below, value=-self._lr / (1 - BETA1**self._steps))
        return moves


@final
class _LoRA:
    """See :func:`lora`. A is [r, in] and B [out, r], whichever way a layer holds its weight."""

    def __init__(self, theta: Theta, lr: float, r: int, alpha: float, weight_decay: float) -> None:
        names = {f"{name}.weight" for name in linear_layers(causal_lm(theta.network))}
        self._at = [i for i, name in enumerate(theta.names) if name in names and theta.parameters[i].ndim == 2]
        if not self._at:
            raise ModelError(
                "a LoRA attacker over full weights needs the weights of linear layers to be trainable; a model that "
                "trains an adapter is attacked in the adapter's own coordinates"
            )
        self._turned = transposed_linear(theta.network)
        self._parameters, self._scale = theta.parameters, alpha / r
        shapes = [self._upright(theta.parameters[i]).shape for i in self._at]
        like = theta.parameters[self._at[0]]
        self._a = [_started(r, n_in).to(like) for _, n_in in shapes]
        self._b = [torch.zeros(n_out, r, dtype=like.dtype, device=like.device) for n_out, _ in shapes]
        self._inner = _AdamW([*self._a, *self._b], lr, weight_decay)

    @torch.no_grad()
    def __call__(self, g: Vector) -> Vector:
        grads = [self._upright(g.raw[i]) * (g.scale * self._scale) for i in self._at]
        of_a = [b.T @ whole for b, whole in zip(self._b, grads, strict=True)]
        of_b = [whole @ a.T for a, whole in zip(self._a, grads, strict=True)]
        before = [b @ a for a, b in zip(self._a, self._b, strict=True)]
        torch._foreach_add_([*self._a, *self._b], self._inner.displaced([*of_a, *of_b]))
        # What does not move is one 0 that looks like a tensor of the right shape: no memory.
        moves = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in self._parameters]
        for i, a, b, was in zip(self._at, self._a, self._b, before, strict=True):
            moves[i] = self._upright(self._scale * (b @ a - was))
        return Vector(moves)

    def _upright(self, weight: Tensor) -> Tensor:
        """[out, in] from how the layer holds it; its own inverse."""
        return weight.T if self._turned else weight


def _started(r: int, n_in: int) -> Tensor:
    """A as ``peft`` starts it: uniform within ±1/√in. Drawn on the CPU, so that every device has the same."""
    return torch.empty(r, n_in).uniform_(-1.0, 1.0) / math.sqrt(n_in)
