"""MMD: how far apart two clouds of hidden states lie, as the squared maximum mean discrepancy under RBF kernels.

    MMD²(X, Y) = mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y)          (biased: x = x′ counts)
    k(u, v) = Σ_{i=−2..2} exp(−‖u − v‖² / (σ 2^i))

σ is the mean squared distance between two different rows of X and Y together, so that the value does not depend on the
scale of the states; no gradient runs through it. All distances come from one matrix product: memory is of the order
(n + m)(n + m + d), not (n + m)² d.

The biased estimate is not 0 for equal distributions: in many dimensions it is about :data:`FLOOR` (1/n + 1/m), which is
0.19 for 32 rows on either side, and 1.5 for 4. Two far clusters of 32 rows each give 7.7; it is always below 10.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from immunity.batch import IGNORE

WIDTHS: Final = tuple(2.0**i for i in range(-2, 3))
"""Bandwidths of the five kernels, in units of σ."""
FLOOR: Final = sum(1.0 - math.exp(-1.0 / width) for width in WIDTHS)
"""3.09: what each side's rows, counted as their own neighbours, add to the biased estimate, times 1/n."""

Kernel = Literal["five", "one"]
"""The five kernels in use, or exp(−‖u − v‖²) alone, which the theory of NTL is written for."""
Over = Literal["response", "prompt"]


def mmd2(x: Tensor, y: Tensor, kernel: Kernel = "five") -> Tensor:
    """The biased MMD² between the rows of two clouds: a scalar, at least 0, in fp32 (float64 for float64).

    Symmetric. With five kernels it does not change when all states are scaled. Rows that are all equal give 0 and no
    gradient, not NaN. Computed in full precision also under autocast.

    Args:
        x: [n, d], n ≥ 1.
        y: [m, d], m ≥ 1; n and m may differ.
        kernel: Which k.

    Source:
        Gretton et al. (2012), eq. 5, for the estimate; the five kernels and their detached σ are those of the released
        code of NTL (arXiv 2106.06916) and of RepNoise (arXiv 2405.14577).
    """
    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        d = squared_distances(torch.cat([_full(x), _full(y)]))  # [n + m, n + m]
        k = torch.exp(-d) if kernel == "one" else _five(d)
        return (k[:n, :n].mean() + k[n:, n:].mean() - 2.0 * k[:n, n:].mean()).clamp_min(0.0)


def noise_mmd2(states: Tensor, mask: Tensor | None = None, kernel: Kernel = "five") -> Tensor:
    """MMD² between hidden states and as many rows of standard normal noise, fresh at every call: a scalar.

    A row of a batch is one sample, all its positions and features side by side.

    Args:
        states: [B, T, D].
        mask: Of the positions that count: [B, T] or [B, T, D]. States and noise are 0 elsewhere. None: all of them.
        kernel: Which k.

    Source:
        The noise term of RepNoise (arXiv 2405.14577), of one layer.
    """
    h = _full(states)
    noise = torch.randn_like(h)
    if mask is not None:
        left_out = ~mask.bool().reshape(*mask.shape, *[1] * (h.dim() - mask.dim()))
        h, noise = h.masked_fill(left_out, 0.0), noise.masked_fill(left_out, 0.0)
    return mmd2(h.flatten(1), noise.flatten(1), kernel)


def squared_distances(z: Tensor) -> Tensor:
    """‖z_a − z_b‖² of all pairs of rows [N, d]: [N, N], never negative, 0 on the diagonal.

    By ‖a − b‖² = a·a + b·b − 2 a·b. The rows are centred first, which changes no distance: what all hidden states have
    in common is often far longer than what tells them apart, and its square would drown the difference.
    """
    z = z - z.detach().mean(0)
    gram = z @ z.T
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2.0 * gram).clamp_min(0.0)


def pooled(states: Tensor, labels: Tensor, over: Over = "response") -> Tensor:
    """One state for each row, whatever its padding: [B, D], in fp32 (float64 for float64).

    Args:
        states: Hidden states [B, T, D].
        labels: As :class:`~immunity.batch.Padded` has them: [B, T], ignored at prompts and pads.
        over: "response" averages over the response's tokens; "prompt" takes the last token before it, where a model has
            read the question and said nothing yet (the first token of a row that has no prompt).
    """
    h, response = _full(states), labels != IGNORE
    if over == "prompt":
        # The first true entry: argmax of a mask gives it.
        last = (response.int().argmax(1) - 1).clamp_min(0)
        return h[torch.arange(len(h), device=h.device), last]
    kept = h.masked_fill(~response[..., None], 0.0)
    return kept.sum(1) / response.sum(1, keepdim=True)


def _five(d: Tensor) -> Tensor:
    """The sum of the five kernels of squared distances [N, N]."""
    n = len(d)
    sigma = d.detach().sum() / (n * n - n)
    sigma = torch.where(sigma > 0.0, sigma, 1.0)  # all rows are equal: any bandwidth will do
    return torch.stack([torch.exp(-d / (width * sigma)) for width in WIDTHS]).sum(0)


def _full(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
