"""Coupling: the gradient of cos(g_a, g_b), the angle between two gradients, by differences of gradients.

With u = g/‖g‖ and c = ⟨u_a, u_b⟩, and H the Hessians of the two losses,

    ∇c = H_a (u_b − c u_a)/‖g_a‖ + H_b (u_a − c u_b)/‖g_b‖

Each product is a difference of gradients over a short way, so weights in which so short a way is lost are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from immunity.batch import Batch
from immunity.errors import PrecisionError
from immunity.losses import Loss
from immunity.theta import Theta, Vector

Difference = Literal["forward", "central"]
SURVIVES: Final = 0.99
"""Least cosine between the way that was meant and the way that the weights really go."""
PARALLEL: Final = 1e-4
"""Sine of an angle that is not turned further: v is rounding, and the cosine at an end of its range."""
_SAMPLE: Final = 2**16
"""Entries of each tensor that :func:`expected_survival` looks at."""


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of the angle between two vectors; 0 if one of them is 0."""
    lengths = a.norm() * b.norm()
    return (a @ b) / lengths if lengths else 0.0


def cosine_gradient(
    theta: Theta,
    loss: Loss,
    rows: tuple[Batch, Batch],
    at: tuple[Vector, Vector],
    *,
    eps: float,
    difference: Difference = "forward",
) -> Vector:
    """The gradient of cos(g_a, g_b) at ``theta``, for two more gradients ("forward") or four ("central").

    Args:
        theta: At home.
        loss: Whose gradients are compared; smooth.
        rows: Of the one gradient and of the other.
        at: The two gradients, g_a and g_b, at θ.
        eps: ε: how far, in units of a direction no longer than 1, the gradients are taken again. The error is of the
            order ε ("forward") or ε² ("central"), and of rounding in the gradients divided by ε.
        difference: "forward" takes (g(θ + εv) − g(θ))/ε, "central" (g(θ + εv) − g(θ − εv))/2ε.

    Raises:
        PrecisionError: The weights lose the way εv, or gradients are computed in bf16, where differences are noise.

    Source:
        arXiv 2505.12186, the Hessian-free estimate of SEAM.
    """
    g_a, g_b = at
    n_a, n_b, c = g_a.norm(), g_b.norm(), cosine(g_a, g_b)
    if n_a * n_b == 0:
        return 0.0 * g_a  # nothing to turn
    u_a, u_b = (1 / n_a) * g_a, (1 / n_b) * g_b

    def turned(batch: Batch, g: Vector, v: Vector) -> Vector:
        """H v, by gradients exactly ``eps`` v away."""
        length = v.norm()
        if length < PARALLEL:
            return 0.0 * v
        if (kept := survival(theta.parameters, eps * v)) < SURVIVES:
            raise PrecisionError(lost(kept, eps))
        # ``hvp`` chooses its own way from a scale: this is the scale for which it chooses eps.
        exponent = 1 / 2 if difference == "forward" else 1 / 3
        scale = eps * length / math.pow(torch.finfo(theta.parameters[0].dtype).eps, exponent)
        return theta.hvp(loss, batch, v, scale=scale, at=g if difference == "forward" else None)

    first = turned(rows[0], g_a, u_b - c * u_a)
    return (1 / n_a) * first + (1 / n_b) * turned(rows[1], g_b, u_a - c * u_b)


def survival(weights: Sequence[Tensor], by: Vector) -> float:
    """The cosine between ``by`` and what becomes of it when it is added to ``weights`` in their dtype; 0 if nothing.

    The weights stay as they are; copies of one tensor at a time exist.
    """
    found = []
    for weight, direction in zip(weights, by.raw, strict=True):
        p, d = weight.detach(), by.scale * direction
        exact = torch.promote_types(d.dtype, torch.float32)
        applied, wanted = ((p + d.to(p.dtype)) - p).to(exact), d.to(exact)
        found.append(torch.stack([(applied * wanted).sum(), applied.square().sum(), wanted.square().sum()]))
    inner, went, meant = torch.stack(found).double().sum(0).tolist()
    return float(inner / math.sqrt(went * meant)) if went and meant else 0.0


def expected_survival(weights: Sequence[Tensor], length: float) -> float:
    """:func:`survival` of a random displacement of norm ``length`` over all ``weights``; a sample of each is looked at.

    For before a run: a gradient's entries differ more in size than random ones, so its own survival is measured again.
    """
    generator = torch.Generator().manual_seed(0)
    each = length / math.sqrt(sum(p.numel() for p in weights))
    some = [p.detach().reshape(-1)[:_SAMPLE].cpu() for p in weights]
    return survival(some, Vector([torch.randn(len(p), generator=generator) for p in some], each))


def lost(kept: float, eps: float) -> str:
    """What is wrong where so little survives, and what to do about it."""
    return (
        f"a perturbation of eps = {eps:.3g} does not survive in these weights (cosine {kept:.3f} between what was "
        "meant and what is stored, not 1): differences of gradients would be rounding noise divided by eps. Raise eps "
        "(or set radius=relative), load with dtype='float32', or train a LoRA adapter, which is kept in fp32"
    )
