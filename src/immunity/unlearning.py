"""Unlearning: losses that push restricted answers away from where they were, and end; what must not follow is held.

=================  =====================================================  ==========================================
loss               per row                                                where its gradient ends
=================  =====================================================  ==========================================
:func:`npo`        −(2/β) log σ(β [NLL(y|x) − NLL_before(y|x)])           once the answer has lost many times 1/β nats
:func:`steered`    mean over y of ‖h − c u‖²/D, u a fixed random line     where hidden states lie there
:func:`held`       mean over y of ‖h − h_before‖²/D                       where nothing has changed
=================  =====================================================  ==========================================

The last two are RMU (arXiv 2403.03218). All give one value per example, [B], like every loss.

Shapes: B examples, N response positions, D hidden size.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.hidden import Site, reading
from immunity.losses import Loss, causal_lm, row_means
from immunity.preference import Per, log_prob, log_prob_per_token
from immunity.reference import Reference


@final
class Remembered:
    """What every row's answer was worth before the first step: log p(y | x), one number for each, computed once.

    The reference is asked when a row is met for the first time. What it said is part of a run's state, so that a
    resumed run goes on with the same numbers, bit for bit.

    Args:
        reference: Before.
        per: Log-probabilities of whole responses, or their mean per "token".

    Attributes:
        loss: log p(y | x) of a network as it is.
        known: What is known already, by a digest of the row.
    """

    def __init__(self, reference: Reference, per: Per = "response") -> None:
        self.loss = log_prob if per == "response" else log_prob_per_token
        self.known: dict[str, float] = {}
        self._before = reference.at(self.loss)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """[B]; call it before the forward pass whose gradient is wanted."""
        keys = [_digest(row) for row in batch.rows]
        new = {key: row for key, row in zip(keys, batch.rows, strict=True) if key not in self.known}
        if new:
            values = self._before(network, Batch(tuple(new.values()), batch.role))
            self.known.update(zip(new, values.tolist(), strict=True))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """What is known."""
        return {"known": dict(self.known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.known = dict(state["known"])


def npo(before: Remembered, beta: float = 0.1) -> Loss:
    """−(2/β) log σ(β Δ), Δ the nats that the answer has lost since before the first step: [B].

    Its gradient is −2 σ(−β Δ) ∇NLL: that of plain ascent where nothing is lost yet (the value there is (2/β) ln 2), a
    half of that at Δ = 1.1/β, and next to nothing once Δ is many times 1/β.

    Args:
        before: What the answers were worth; says whether Δ is summed over an answer's tokens or averaged.
        beta: β > 0; towards 0 this is plain ascent, without an end.

    Raises:
        SettingsError: β is not positive.

    Source:
        arXiv 2404.05868, eq. 3.
    """
    if not beta > 0:
        raise SettingsError(f"beta = {beta}: NPO needs a positive one; towards 0 it is gradient ascent")

    def of(network: nn.Module, batch: Batch) -> Tensor:
        then = before(network, batch)
        now = before.loss(network, batch)
        return 2.0 / beta * functional.softplus(beta * (now - then.to(now)))

    return Loss("npo", of)


def steered(place: Site, push: float, *, seed: int = 0) -> Loss:
    """RMU's forget term: hidden states of answers are led to c u, a point that means nothing. [B], over N and D.

    Args:
        place: Whose hidden states.
        push: c, the length of the point.
        seed: Of u, uniform in [0, 1) and normalised; the caller's random numbers stay as they are.
    """

    def of(network: nn.Module, batch: Batch) -> Tensor:
        states, keep = _states(network, batch, place)
        u = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        goal = (push * u / u.norm()).to(states)
        return row_means((states - goal).square().mean(-1), keep)

    return Loss("steered", of)


def held(reference: Reference, place: Site) -> Loss:
    """RMU's retain term: hidden states of answers stay where they were. [B], mean over N and D."""

    def of(network: nn.Module, batch: Batch) -> Tensor:
        with reference.standing() as before:
            then, _ = _states(before, batch, place)
        states, keep = _states(network, batch, place)
        return row_means((states - then).square().mean(-1), keep)

    return Loss("held", of)


def _states(network: nn.Module, batch: Batch, place: Site) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] that predict response tokens, in fp32 at least, and where they belong: [B, T-1]."""
    ids, mask, labels = batch.padded(next(network.parameters()).device)
    with reading(network, (place,)) as seen:
        causal_lm(network).base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    h, keep = seen[place], labels[:, 1:] != IGNORE
    return (h if h.dtype == torch.float64 else h.float())[:, :-1][keep], keep


def _digest(row: Tokens) -> str:
    return hashlib.blake2b(array("q", (*row.ids, *row.labels)).tobytes(), digest_size=16).hexdigest()
