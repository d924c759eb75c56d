"""Invariance: how much a fine-tune on some data would gain by scaling something, and the gradient of its square.

A network that cannot gain by a scale w (dℓ/dw = 0 at w = 1) is at a stationary point of that fine-tune, in one
direction. Invariant risk minimisation (arXiv 1907.02893, IRMv1) descends on the square of dℓ/dw. What is scaled:

==========  =============================================  ======================================================
reading     r                                              what its gradient costs
==========  =============================================  ======================================================
"logits"    dℓ(w z)/dw at 1 = mean_t (softmax z − e_y)·z   one gradient: ∇r² = 2 r ∇r, and r is known after it
"weights"   dℓ(w θ)/dw at 1 = ⟨θ, ∇ℓ⟩                      three: ∇r = ∇ℓ + H θ, by differences of gradients
"gradient"  no scale: ‖∇ℓ‖² itself, whose ∇ is 2 H ∇ℓ      three
==========  =============================================  ======================================================

None needs a double backward. The square of a mean over a few rows overestimates the square of the mean over all of
them; the product r₁ r₂ of two batches does not (it can be negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.losses import Loss, chunked, nll, response_states, row_means
from immunity.theta import Theta, Vector

Reading = Literal["logits", "weights", "gradient"]
"""What "w" scales."""

RANGE: Final = 0.1
"""Share of a point's own length over which gradients change noticeably: the scale of differences along it."""


def _sharpened(scores: Tensor, targets: Tensor) -> Tensor:
    """(softmax(z) − e_y)·z of logits [n, V]: [n]."""
    shifted = scores - scores.detach().amax(-1, keepdim=True)  # a constant changes nothing: p − e_y sums to 0
    return (shifted.softmax(-1) * shifted).sum(-1) - shifted.gather(-1, targets[:, None])[:, 0]


def _slope(network: nn.Module, batch: Batch) -> Tensor:
    states, targets, keep = response_states(network, batch)
    return row_means(chunked(network, states, targets, _sharpened), keep)


logit_slope: Final = Loss("logit-slope", _slope)
"""dℓ/dw of the loss ℓ with logits w z, at w = 1, averaged over the response positions of each row: [B].

Negative where a model should be surer of its answers, positive where it is too sure, 0 where its temperature is right.
"""


def penalty(theta: Theta, batches: Sequence[Batch], reading: Reading = "logits") -> Vector:
    """∇ of r² over one batch, or of r₁ r₂ over two ("gradient": of ‖∇ℓ‖², or of ⟨∇ℓ₁, ∇ℓ₂⟩), at this point.

    The value is logged as "invariance/" and the role.

    Args:
        theta: Where.
        batches: One, or two of different rows.
        reading: See the module.

    Raises:
        SettingsError: There is no such reading, or neither one batch nor two.
        PrecisionError: Under bf16 autocast, where "weights" and "gradient" would be noise.
    """
    if reading not in get_args(Reading) or len(batches) not in {1, 2}:
        raise SettingsError(
            f"reading = {reading!r} over {len(batches)} batches: use one of {', '.join(get_args(Reading))}, over one "
            "batch or two"
        )
    if reading == "gradient":
        gradients = [theta.grad(nll, batch) for batch in batches]
        value, found = gradients[0] @ gradients[-1], _curved(theta, batches[0], gradients[-1])
        found = 2.0 * found if len(batches) == 1 else found + _curved(theta, batches[1], gradients[0])
    else:
        slopes = [_of_logits(theta, b) if reading == "logits" else _of_weights(theta, b) for b in batches]
        (r, v), (s, u) = slopes[0], slopes[-1]
        value, found = r * s, (2.0 * r) * v if len(batches) == 1 else s * v + r * u
    theta.trace[f"invariance/{batches[0].role}"] = value
    return found


def _of_logits(theta: Theta, batch: Batch) -> tuple[float, Vector]:
    """Slope r and ∇r. The trace names a value by the place, which need not be home: so it is looked at alone."""
    before, theta.trace = theta.trace, {}
    try:
        found = theta.grad(logit_slope, batch)
        (r,) = theta.trace.values()
    finally:
        theta.trace = {**before, **theta.trace}
    return r, found


def _of_weights(theta: Theta, batch: Batch) -> tuple[float, Vector]:
    """Slope r = ⟨θ, ∇ℓ⟩ over the weights that train, and ∇r = ∇ℓ + H θ."""
    g, here = theta.grad(nll, batch), Vector([p.detach().clone() for p in theta.parameters])
    return here @ g, g + theta.hvp(nll, batch, here, scale=RANGE * here.norm())


def _curved(theta: Theta, batch: Batch, v: Vector) -> Vector:
    """H v."""
    length = torch.linalg.vector_norm(torch.stack([p.detach().norm() for p in theta.parameters]))
    return theta.hvp(nll, batch, v, scale=RANGE * float(length))
