"""Extrapolation: W + α (U_k U_kᵀ) D for D = W − W_before = U S Vᵀ, matrix by matrix, and what goes with it.

U_k U_kᵀ D is the leading part U_k S_k V_kᵀ of D. One D at a time is in memory, and a few rows of its leading part. What
is added is rounded to the precision of W, where much of a small edit can be lost: it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from immunity.errors import ModelError, SettingsError
from immunity.losses import causal_lm
from immunity.models import LanguageModel
from immunity.stored import Stored
from immunity.weights import Kept, LowRank, low_rank

Svd = Literal["randomised", "exact"]
Subtract = Literal["float32", "bfloat16"]

ROWS: Final = 2**20
"""Entries of a matrix that are edited at once: 4 MiB in fp32."""
RHO: Final = 0.01
"""How much more often than the aligned model a model of low rank may be unsafe (LoX's rule)."""


class Pair(NamedTuple):
    """A weight and what the files of the model before call it.

    Attributes:
        name: In the network.
        weight: The parameter, of two dimensions or more.
        stored: None where the files have none of its names.
    """

    name: str
    weight: nn.Parameter
    stored: str | None


@dataclass
class Applied:
    """Sums over all that was edited: what was meant to be added, what was added, and to what.

    Attributes:
        intended: ‖α U_k S_k V_kᵀ‖².
        applied: Its squared norm after rounding.
        product: The inner product of the two.
        weights: ‖W‖² before.
        difference: ‖D‖².
        leading: ‖U_k S_k V_kᵀ‖².
    """

    intended: float = 0.0
    applied: float = 0.0
    product: float = 0.0
    weights: float = 0.0
    difference: float = 0.0
    leading: float = 0.0

    @property
    def survived(self) -> float:
        """The cosine between what was meant and what was done: 1 where nothing was lost; 1 where nothing was meant."""
        if not self.intended:
            return 1.0
        return self.product / (self.intended * self.applied) ** 0.5 if self.applied else 0.0

    def summary(self) -> dict[str, float]:
        """For a log: the edit relative to the weights, the share of ‖D‖ that leads, and what survived rounding."""
        return {
            "edit/relative": (self.applied / self.weights) ** 0.5 if self.weights else 0.0,
            "edit/leading": (self.leading / self.difference) ** 0.5 if self.difference else 0.0,
            "edit/survived": self.survived,
        }


def pairs(network: nn.Module, before: Stored, *, embeddings: bool = True) -> Iterator[Pair]:
    """Every weight of two dimensions or more, each once however many names it has.

    Args:
        network: Without an adapter.
        before: Where to look for the same weights.
        embeddings: Whether those of tokens and positions, and the head, are among them.
    """
    model = causal_lm(network)
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    left_out = set() if embeddings else {id(p) for p in _embeddings(model)}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and id(weight) not in left_out:
            yield Pair(name, weight, before.called(names[id(weight)]))


def misfit(pair: Pair, before: Stored) -> str:
    """Why a weight cannot be compared with the one before; "" if it can."""
    if pair.stored is None:
        return f"{pair.name} is missing there"
    shape = before.places[pair.stored].shape
    if shape != tuple(pair.weight.shape):
        return f"{pair.name} is {'×'.join(map(str, shape))} there and {'×'.join(map(str, pair.weight.shape))} here"
    return ""


def difference(weight: Tensor, before: Tensor, subtract: Subtract = "float32") -> Tensor:
    """D = W − W_before, in fp32 (float64 for float64); subtracted in bfloat16 it keeps 8 bits of either."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    there = before.to(weight.device)
    if subtract == "bfloat16":
        return (weight.bfloat16() - there.bfloat16()).to(wide)
    return weight.to(wide) - there.to(wide)


def part(delta: Tensor, k: int, svd: Svd = "randomised") -> LowRank:
    """The leading part of a matrix [m, n]: of rank k, or less where there is less.

    Args:
        delta: D.
        k: The rank, at least 1.
        svd: "exact" decomposes in full; "randomised" does so for matrices up to 1024, see
            :func:`~immunity.weights.low_rank`.
    """
    found = low_rank(delta, min(delta.shape) if svd == "exact" else k)
    return LowRank(found.u[:, :k].contiguous(), found.s[:k], found.v[:, :k].contiguous())


def push(weight: Tensor, leading: LowRank, alpha: float, total: Applied) -> None:
    """W ← W + α U_k S_k V_kᵀ, in place, rounded to W's precision; what was meant and done is added to ``total``."""
    rows = max(1, ROWS // weight.shape[1])
    for at in range(0, len(weight), rows):
        here = weight[at : at + rows]
        step = (leading.u[at : at + rows] * leading.s) @ leading.v.T
        was = here.to(step.dtype, copy=True)
        here.copy_(was + alpha * step)
        done = here.to(step.dtype) - was
        total.intended += alpha**2 * float(step.square().sum())
        total.applied += float(done.square().sum())
        total.product += alpha * float((done * step).sum())
        total.weights += float(was.square().sum())
    total.leading += float(leading.s.square().sum())


def extrapolate(
    weight: Tensor,
    before: Tensor,
    alpha: float,
    k: int,
    *,
    svd: Svd = "randomised",
    subtract: Subtract = "float32",
    total: Applied | None = None,
) -> Applied:
    """W ← W + α U_k U_kᵀ (W − W_before), in place; a weight of more than two dimensions is that many matrices.

    Args:
        weight: [m, n], or [.., m, n].
        before: Of the same shape.
        alpha: α.
        k: The rank.
        svd: See :func:`part`.
        subtract: See :func:`difference`.
        total: Where to add up what was done; None starts anew.

    Returns:
        ``total``.
    """
    total = Applied() if total is None else total
    shape = (-1, *weight.shape[-2:])
    for matrix, there in zip(weight.view(shape), before.view(shape), strict=True):
        delta = difference(matrix, there, subtract)
        length = float(delta.square().sum())
        if length:
            total.difference += length
            leading = part(delta, k, svd)
            del delta
            push(matrix, leading, alpha, total)
    return total


def along(delta: Tensor, leading: LowRank) -> float:
    """‖U_k U_kᵀ Δ‖/‖Δ‖: how much of a difference lies where the leading part of another one writes.

    LoX's diagnostic: of the alignment itself (R_align), and of alignment and a later fine-tune together (R_ft),
    averaged over the linear layers, with k = 100; where it falls, the fine-tune has moved elsewhere.
    """
    return float((leading.u.T @ delta).norm() / delta.norm())


def smallest_rank(
    model: LanguageModel,
    before: Stored,
    unsafe: Callable[[LanguageModel], float],
    *,
    ranks: Sequence[int] = (1, 2, 3, 4, 6, 8),
    rho: float = RHO,
    svd: Svd = "randomised",
    embeddings: bool = True,
) -> int:
    """LoX's rule for k: the smallest r with unsafe(before + the leading r of D) − unsafe(aligned) < ρ.

    Vectors, norms among them, keep their whole difference, as in the released code. Costs a copy of the weights, and a
    measurement for each rank; the model is as found afterwards.

    Args:
        model: Aligned, without an adapter.
        before: The weights that it was aligned from.
        unsafe: How often a model answers what it should not (the paper: GPT-4o-mini on the first 100 of AdvBench).
        ranks: To try, upwards.
        rho: ρ.
        svd: See :func:`part`.
        embeddings: See :func:`pairs`.

    Raises:
        SettingsError: None of the ranks is enough.
        ModelError: The models do not fit.
    """
    chosen = list(pairs(model.network, before, embeddings=embeddings))
    if wrong := next((why for why in (misfit(pair, before) for pair in chosen) if why), ""):
        raise ModelError(f"the model before is another one: {wrong}")
    home = Kept([pair.weight for pair in chosen])
    most, aligned = max(ranks), unsafe(model)
    try:
        with torch.no_grad():
            for r in sorted(ranks):
                home.restore()
                for pair in chosen:
                    _reduce(pair.weight, before[str(pair.stored)], r, svd)
                if unsafe(model) - aligned < rho:
                    return r
    finally:
        home.restore()
    raise SettingsError(
        f"of rank {most} the difference is still less safe than all of it by {rho} or more: try larger ranks"
    )


def _reduce(weight: Tensor, before: Tensor, r: int, svd: Svd) -> None:
    """W ← W_before + the leading r of W − W_before."""
    shape = (-1, *weight.shape[-2:])
    for matrix, there in zip(weight.detach().view(shape), before.view(shape), strict=True):
        delta = difference(matrix, there)
        if bool(delta.any()):
            matrix.copy_(there.to(delta) + part(delta, r, svd).matrix())


def _embeddings(model: nn.Module) -> Iterable[nn.Parameter]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = causal_lm(model).get_output_embeddings()
    return [p for module in [*tables, *([head] if head is not None else [])] for p in module.parameters()]
