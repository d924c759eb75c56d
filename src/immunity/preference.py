"""Preference losses over pairs: DPO and IPO, whose gradient is taken in two passes.

A pair couples a row of one batch to a row of another, and a gradient is taken over one batch. But what couples them is
one number: with the margin m = [log π(chosen) − log π(rejected)] − [the same under the reference], a loss f(m) has the
gradient f′(m) (∇ log π(chosen) − ∇ log π(rejected)). So a first pass without gradients finds every f′(m), and a second
weights the rows' gradients with it: exact, and the size of micro-batches changes nothing.

Shapes: B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import Batch, Tokens
from immunity.errors import SettingsError
from immunity.losses import Loss, nll
from immunity.theta import Theta, Vector

Kind = Literal["dpo", "ipo"]
Per = Literal["response", "token"]


def _sums(network: nn.Module, batch: Batch) -> Tensor:
    lengths = torch.tensor([float(row.n_response) for row in batch.rows])
    values = nll(network, batch)
    return -values * lengths.to(values)


log_prob: Final = Loss("log-prob", _sums)
"""log p(response | prompt) of each row, in nats, summed over its tokens: [B]."""
log_prob_per_token: Final = Loss("log-prob-per-token", lambda network, batch: -nll(network, batch))
"""The same divided by the number of tokens: [B]."""


class Judged(NamedTuple):
    """A preference loss of each pair, f(m), and its slope f′(m): [B], float64."""

    values: Tensor
    slopes: Tensor


def each(theta: Theta, loss: Loss, batch: Batch) -> tuple[float, ...]:
    """The value of every row, in the batch's order, without a gradient; logged like :meth:`Theta.value`.

    The pass is Theta's own: its micro-batches, its compute dtype.

    Raises:
        SettingsError: The loss couples examples: what it gives for one row is not that row's.
        DivergedError: The mean is NaN or infinite.
    """
    if loss.coupled:
        raise SettingsError(f"the loss {loss.name!r} couples the examples of a batch: it has no value for each row")
    rows = _apart(batch)
    found: dict[int, float] = {}

    def of(network: nn.Module, part: Batch) -> Tensor:
        values = loss(network, part)
        found.update(zip(map(id, part.rows), values.tolist(), strict=True))
        return values

    theta.value(Loss(loss.name, of), rows)
    return tuple(found[id(row)] for row in rows.rows)


def margins(theta: Theta, chosen: Batch, rejected: Batch, loss: Loss = log_prob) -> tuple[float, ...]:
    """Margin log π(chosen) − log π(rejected) of each pair, without a gradient.

    Args:
        theta: Where.
        chosen: One answer to each prompt.
        rejected: The other, row for row in step.
        loss: :data:`log_prob` or :data:`log_prob_per_token`; ``reference.at(log_prob)`` for those of a reference.

    Raises:
        SettingsError: The batches are not in step.
    """
    _check_pairs(chosen, rejected)
    pairs = zip(each(theta, loss, chosen), each(theta, loss, rejected), strict=True)
    return tuple(better - worse for better, worse in pairs)


def judged(kind: Kind, beta: float, margin: Sequence[float]) -> Judged:
    """The loss and its slope at each margin (that of the reference already taken off).

    "dpo" is −log σ(β m) (arXiv 2305.18290, eq. 7); "ipo" is (m − 1/(2β))² (arXiv 2310.12036, eq. 17).

    Raises:
        SettingsError: There is no such loss, or β is not positive.
    """
    if kind not in {"dpo", "ipo"} or not beta > 0:
        raise SettingsError(f"kind = {kind!r}, beta = {beta}: use dpo or ipo with a positive beta")
    m = torch.tensor(list(margin), dtype=torch.float64)
    if kind == "dpo":
        return Judged(functional.softplus(-beta * m), -beta * torch.sigmoid(-beta * m))
    off = m - 1.0 / (2.0 * beta)
    return Judged(off**2, 2.0 * off)


def preferred(
    theta: Theta,
    chosen: Batch,
    rejected: Batch,
    *,
    kind: Kind = "dpo",
    beta: float = 0.1,
    per: Per = "response",
    before: Sequence[float] = (),
) -> Vector:
    """∇ of the weighted mean over pairs of a preference loss, at this point.

    Two forward passes over either batch, one of them with its backward pass. The loss is logged under either role.

    Args:
        theta: Where.
        chosen: The answers to make more likely; its weights are the pairs'.
        rejected: The answers to make less likely, row for row in step.
        kind: See :func:`judged`.
        beta: β.
        per: Log-probabilities of whole responses, or "token" for their mean over tokens (a length-normalised loss).
        before: The reference's :func:`margins`, taken with the same ``per``; () for a loss without a reference.

    Raises:
        SettingsError: The batches are not in step, there is no such loss, or ``before`` has another length.
        DivergedError: A log-probability is NaN or infinite.
    """
    loss = log_prob if per == "response" else log_prob_per_token
    now = margins(theta, chosen, rejected, loss)
    if before and len(before) != len(now):
        raise SettingsError(f"`before` has {len(before)} margins for {len(now)} pairs")
    found = judged(kind, beta, [m - b for m, b in zip(now, before or [0.0] * len(now), strict=True)])
    rows, others = _apart(chosen), _apart(rejected)
    up = theta.grad(_weighted(kind, loss, rows, found, 1.0), rows)
    return up + theta.grad(_weighted(kind, loss, others, found, -1.0), others)


def _weighted(name: str, loss: Loss, batch: Batch, found: Judged, sign: float) -> Loss:
    """A loss with a pair's value and, with respect to the log-probability of this row of it, a pair's slope."""
    known = {id(row): (float(v), float(s)) for row, v, s in zip(batch.rows, *found, strict=True)}

    def of(network: nn.Module, part: Batch) -> Tensor:
        said = loss(network, part)
        numbers = torch.tensor([known[id(row)] for row in part.rows], dtype=said.dtype, device=said.device)  # [B, 2]
        return numbers[:, 0] + sign * numbers[:, 1] * (said - said.detach())

    return Loss(name, of)


def _apart(batch: Batch) -> Batch:
    """The same rows as objects of their own, so that a row which is there twice is known by its place."""
    return Batch(tuple(Tokens(*row) for row in batch.rows), batch.role, batch.weights)


def _check_pairs(chosen: Batch, rejected: Batch) -> None:
    if len(chosen) != len(rejected) or chosen.weights != rejected.weights:
        raise SettingsError(
            f"{len(chosen)} rows of {chosen.role!r} and {len(rejected)} of {rejected.role!r} are no pairs: give either "
            "role the same number of rows, with the same weights"
        )
