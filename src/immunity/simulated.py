"""Simulated attackers: rules that turn a harmful gradient into the step an attacker would take.

Methods that look ahead (CTRAP, Booster, TAR, …) walk with these; nothing here sees data or a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.losses import Loss
from immunity.theta import Theta, Vector

Rule = Literal["plain", "normalised", "adam"]
Curvature = Literal["none", "forward", "central"]
"""How ∂θ′/∂θ enters a gradient: not at all, or by forward or central differences of gradients."""
Walker = Callable[[Vector], Vector]
"""Gradient -> displacement. May carry moments, so make a fresh one for each excursion."""

BETA1: Final = 0.9
BETA2: Final = 0.999
EPS: Final = 1e-7


def walker(rule: Rule, alpha: float) -> Walker:
    """A fresh attacker.

    Args:
        rule: "plain" steps −α g; "normalised" steps −α g/(‖g‖ + 1e-7), one norm over all weights; "adam" steps along
            Adam's direction (bias-corrected moments, β = .9, .999), rescaled to length α: its radius is known.
        alpha: Step size: a learning rate for "plain", a distance in weight space for the other two.
    """
    if rule == "plain":
        return lambda g: -alpha * g
    if rule == "normalised":
        return lambda g: -alpha * g.unit(EPS)
    return _Adam(alpha)


def pulled_back(
    theta: Theta, loss: Loss, batch: Batch, g: Vector, v: Vector, *, rule: Rule, alpha: float, curvature: Curvature
) -> Vector:
    """(∂θ′/∂θ)ᵀ v for θ′ = θ − α s(g), g = ∇loss(θ): the gradient in θ of what has the gradient ``v`` in θ′.

    v − α H v for the plain step; v − (α/n) H (v − g ⟨g, v⟩/(‖g‖ n)) with n = ‖g‖ + 1e-7 for the normalised one.

    Args:
        theta: At home.
        loss: Whose gradient the simulated step goes along.
        batch: The rows of that gradient.
        g: ∇loss(θ).
        v: A gradient taken at θ′.
        rule: The simulated step: "plain" or "normalised".
        alpha: Its size, as :func:`walker` takes it.
        curvature: "none" gives ``v`` back; "forward" costs one further gradient, "central" two.

    Raises:
        SettingsError: There is curvature to count, and the rule is "adam", which has no such form.
        PrecisionError: See :meth:`Theta.hvp`.
    """
    length = g.norm()
    if curvature == "none" or alpha * length == 0.0:
        return v
    if rule == "adam":
        raise SettingsError(f"curvature = {curvature!r} needs a plain or normalised simulated step, not {rule!r}")
    step, along = alpha, v
    if rule == "normalised":
        n = length + EPS
        step, along = alpha / n, v - ((g @ v) / (length * n)) * g
    known = g if curvature == "forward" else None
    return v - step * theta.hvp(loss, batch, along, scale=step * length, at=known)


class _Adam:
    """Adam's direction, rescaled to a fixed length. Holds two copies of the weights, however many steps it takes."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.steps = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def __call__(self, g: Vector) -> Vector:
        grads = g.tensors()
        if not self.first:
            self.first = [torch.zeros_like(t) for t in grads]
            self.second = [torch.zeros_like(t) for t in grads]
        self.steps += 1
        torch._foreach_lerp_(self.first, grads, 1 - BETA1)
        torch._foreach_mul_(self.second, BETA2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - BETA2)
        scale = torch._foreach_sqrt(torch._foreach_div(self.second, 1 - BETA2**self.steps))
        torch._foreach_add_(scale, 1e-8)
        direction = torch._foreach_div(torch._foreach_div(self.first, 1 - BETA1**self.steps), scale)
        return -self.alpha * Vector(list(direction)).unit(EPS)
