"""Noise that is as large as the hidden states that it is added to, drawn for each example by itself.

    theta.grad(noised(nll, [Site(12, "output")], seed=7), batch)  # LAPT

Shapes: B examples, T tokens, D hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.hidden import Site, reading, replacing
from immunity.losses import Loss, response_states
from immunity.transforms import Positions, chosen, perturbed, unchanged


def noised(
    loss: Loss,
    places: Sequence[Site],
    *,
    seed: int,
    scale: float = 1.0,
    positions: Positions = "predicting",
    like: Mapping[Site, Site] | None = None,
    apart: bool = True,
) -> Loss:
    """``loss`` where noise is added to hidden states that is as large as they are; no gradient flows into it.

    δ ~ N(0, I), and what is added is c [μ(h) + σ(h) (δ − μ(δ)) / σ(δ)], with mean and deviation over the D entries of
    one vector h: for c = 1 the noise has h's mean and deviation, so its length. It costs a pass without gradients.

    Args:
        loss: What is computed. In the log the result is "noised-" and its name.
        places: Where noise is added. With several, each h is that of the pass without noise.
        seed: With an example's ids it decides the example's noise, whatever the rows beside it; from 0.
        scale: c.
        positions: At which positions noise is added.
        like: Place -> the site whose hidden states give mean and deviation; None: those that it is added to.
        apart: Whether two examples have noise of their own; False: the same table for all that have one length.

    Raises:
        SettingsError: There is no such kind of position, no place, or the seed is negative.

    Source:
        arXiv 2506.16078, the noise of its attack (ASA).
    """
    if not places or seed < 0:
        raise SettingsError(f"places = {tuple(places)}, seed = {seed}: give at least one place, and a seed from 0")
    sources = {place: place if like is None else like[place] for place in places}

    def additions(network: nn.Module, batch: Batch) -> Mapping[Site, Tensor]:
        read = list(dict.fromkeys(sources.values()))
        with torch.no_grad(), replacing(network, unchanged(network, {})), reading(network, read) as seen:
            response_states(network, batch)
        here = chosen(batch.padded(next(network.parameters()).device), positions)[..., None]  # [B, T, 1]
        return {
            place: torch.where(
                here, scale * _as_large(seen[source], _drawn(batch, seed, place, seen[source], apart)), 0
            )
            for place, source in sources.items()
        }

    return perturbed(loss, additions, name=f"noised-{loss.name}", coupled=False)


def _as_large(h: Tensor, noise: Tensor) -> Tensor:
    """``noise`` with the mean and the deviation of ``h``, vector by vector: [B, T, D], in h's dtype."""
    wide = h.to(noise.dtype)
    unit = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
    return (wide.mean(-1, keepdim=True) + wide.std(-1, keepdim=True) * unit).to(h.dtype)


def _drawn(batch: Batch, seed: int, place: Site, h: Tensor, apart: bool) -> Tensor:
    """Normal noise of h's shape, drawn row by row on the CPU, so that it is the same however a batch is split."""
    drawn = torch.zeros(h.shape, dtype=torch.promote_types(h.dtype, torch.float32))
    for i, row in enumerate(batch.rows):
        key = zlib.crc32(repr((seed, place.layer, row.ids if apart else len(row.ids))).encode())
        generator = torch.Generator().manual_seed(key)
        drawn[i, : len(row.ids)] = torch.randn(len(row.ids), h.shape[-1], generator=generator, dtype=drawn.dtype)
    return drawn.to(h.device)
