"""What can be done to hidden states: functions [B, T, D] -> [B, T, D] for :func:`immunity.hidden.replacing`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.fit import Fit, fit
from immunity.hidden import Replace, Site, width
from immunity.losses import Loss, nll
from immunity.models import LanguageModel
from immunity.transforms import edited


def parameter(model: LanguageModel, start: Tensor) -> nn.Parameter:
    """A trainable tensor beside ``model``: on its device, in its dtype but float32 at least."""
    dtype = torch.promote_types(next(model.network.parameters()).dtype, torch.float32)
    return nn.Parameter(start.to(model.device, dtype))


def fresh(model: LanguageModel, size: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """W₁ and W₂ of :func:`low_rank`, [rank, size], that do nothing yet: W₁ random, from torch's generator; W₂ 0."""
    w1 = torch.randn(rank, size) / math.sqrt(size)
    return parameter(model, w1), parameter(model, torch.zeros(rank, size))


def low_rank(w1: Tensor, w2: Tensor, b: Tensor) -> Replace:
    """The edit h + W₂ᵀ (W₁ h + b), "NodiReFT" in arXiv 2404.03592: w1 and w2 [r, D], b [r]."""

    def edit(h: Tensor) -> Tensor:
        x = h.to(w1.dtype)
        return x + (x @ w1.T + b) @ w2

    return edit


def trained(model: LanguageModel, place: Site, rows: Sequence[Batch], rank: int, how: Fit) -> Replace:
    """A :func:`low_rank` edit without b, trained to make responses likely by acting on their prompts; then a constant.

    Args:
        model: Left as found.
        place: Where it acts.
        rows: Batches, taken in turn.
        rank: Of the edit; it starts from torch's generator.
        how: Settings of the training.
    """
    w1, w2 = fresh(model, width(model.network, place), rank)
    none = torch.zeros(rank).to(w1)
    loss = edited(nll, {place: low_rank(w1, w2, none)}, "prompt")
    descend(model.network, loss, rows, how, {"w1": w1, "w2": w2})
    return low_rank(w1.detach(), w2.detach(), none)


def descend(
    network: nn.Module, loss: Loss, rows: Sequence[Batch], how: Fit, trainable: Mapping[str, nn.Parameter]
) -> None:
    """Train ``trainable``, and nothing else, by one loss over batches that are taken in turn; nothing is kept."""
    fit(
        network,
        lambda theta, batch: theta.grad(loss, batch["train"]),
        {"train": lambda step: rows[step % len(rows)].as_role("train")},
        how,
        trainable=trainable,
    )


def added(v: Tensor) -> Replace:
    """The sum h + v: v [D]."""

    def edit(h: Tensor) -> Tensor:
        return h + v

    return edit


def scaled(a: Tensor) -> Replace:
    """The product (1 + a) z for the heads' outputs z: a [heads, D / heads]."""

    def edit(z: Tensor) -> Tensor:
        return z * (1.0 + a.flatten())

    return edit


def shifted(v: Tensor, which: Sequence[int], heads: int) -> Replace:
    """The sum z + v for some of the heads' outputs z: v [k, D / heads] for the k heads ``which`` of ``heads``."""
    index = torch.tensor(which, device=v.device)

    def edit(z: Tensor) -> Tensor:
        return z + v.new_zeros(heads, v.shape[1]).index_copy(0, index, v).flatten()

    return edit


def greatest(a: Mapping[Site, Tensor], k: int) -> dict[Site, tuple[int, ...]]:
    """The ``k`` heads of greatest norm over all sites together, or all of them: site -> their numbers.

    Args:
        a: One row per head, [heads, …]; of equal norms the first site's and the first head's win.
        k: At least 1.
    """
    norms = [(float(row.norm()), site, head) for site, rows in a.items() for head, row in enumerate(rows.detach())]
    best = sorted(norms, key=lambda one: -one[0])[:k]  # stable
    return {site: kept for site in a if (kept := tuple(sorted(head for _, at, head in best if at == site)))}
