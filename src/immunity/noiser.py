"""The token noiser of Token Buncher: cross-entropy whose target leaves a part of its mass to all other tokens.

    −(1 − λ) log p(y) − μ Σ_{v ≠ y} z_v log p(v),    z ≥ 0,  Σ_{v ≠ y} z_v = 1

An answer becomes likely and what is left becomes noise, so that whoever raises the entropy later raises that noise. The
loss is linear in z: with a fresh z each time it descends, on average, along the loss with z = 1/(V − 1).

Shapes: B examples, N response positions, V vocabulary.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

import torch
from torch import Tensor, nn

from immunity.batch import IGNORE, Batch
from immunity.errors import SettingsError
from immunity.losses import Loss, chunked, response_states, row_means


def noiser(noise: float, *, mass: float | None = None, seed: int | None = None) -> Loss:
    """The loss above, averaged over the response positions of each row: [B].

    Args:
        noise: λ, from 0 (plain cross-entropy) to below 1.
        mass: μ, that of all other tokens together; None is λ, with which the target adds up to 1.
        seed: z_v is u_v over the sum of all, with u ~ U(0, 1) for each token at each position of each row, whatever the
            rows beside it; the seed says which. None: z = 1/(V − 1).

    Raises:
        SettingsError: λ or μ is out of range.

    Source:
        arXiv 2508.20697 and its released code.
    """
    mu = noise if mass is None else mass
    if not 0 <= noise < 1 or not 0 <= mu < 1:
        raise SettingsError(f"noise = {noise}, mass = {mass}: a share of the target lies between 0 and 1")

    def each(scores: Tensor, wanted: Tensor) -> Tensor:
        target, key = wanted[:, :1], wanted[:, 1:]  # [n, 1]
        log_p = scores.log_softmax(-1)
        z = torch.ones_like(log_p) if seed is None else uniform(key, log_p.shape[-1]).to(log_p)
        z = z.scatter(-1, target, 0.0)
        said, others = log_p.gather(-1, target)[:, 0], (z * log_p).sum(-1) / z.sum(-1)
        return -(1.0 - noise) * said - mu * others

    return _of(each, seed)


def uniform(key: Tensor, n: int) -> Tensor:
    """``n`` numbers in [0, 1) for each key, the same on every device: [.., 1] -> [.., n], float64.

    They are what SplitMix64 gives after so many steps (Steele, Lea and Flood, OOPSLA 2014): a generator that can be
    asked for any of its numbers at once.
    """
    x = key + torch.arange(1, n + 1, device=key.device) * _signed(0x9E3779B97F4A7C15)  # int64 wraps round
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() / 2.0**53


def _of(each: Callable[[Tensor, Tensor], Tensor], seed: int | None) -> Loss:
    def of(network: nn.Module, batch: Batch) -> Tensor:
        states, targets, keep = response_states(network, batch)
        keys = torch.tensor(_keys(batch, seed), dtype=torch.int64, device=targets.device)
        wanted = torch.stack([targets, keys], 1)  # [N, 2]
        return row_means(chunked(network, states, wanted, each), keep)

    return Loss("noiser", of)


def _keys(batch: Batch, seed: int | None) -> list[int]:
    """One for each response position, of its row and place alone: [N]."""
    found = []
    for row in batch.rows:
        own = zlib.crc32(array("q", (seed or 0, *row.ids)).tobytes()) << 30
        found += [own + t for t, label in enumerate(row.labels) if t and label != IGNORE]
    return found


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64)
