"""Losses on hidden states at every depth: how far they have drifted, and a mapping of them to nowhere.

The depths are those that transformers calls hidden states: what enters the first block, what leaves each block, the
last one after the final norm. Shapes: B examples, T tokens, D hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import Batch, Padded
from immunity.bounded import wide
from immunity.errors import SettingsError
from immunity.hidden import Site, n_layers, reading
from immunity.losses import Loss, causal_lm
from immunity.reference import Reference


def depths(network: nn.Module, padded: Padded) -> list[Tensor]:
    """Hidden states [B, T, D] at all L + 1 depths, with their graph, fp32 at least.

    Raises:
        ModelError: The network's blocks cannot be found.
    """
    places = (Site(0, "input"), *(Site(layer, "output") for layer in range(n_layers(network) - 1)))
    with reading(network, places) as seen:
        last = causal_lm(network).base_model(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
        )
    found = [*(seen[place] for place in places), last.last_hidden_state]
    return [h if h.dtype == torch.float64 else h.float() for h in found]


def drift(reference: Reference, *, norm: Literal["norm", "squared"] = "norm", width: int | None = None) -> Loss:
    """How far hidden states are from those of before: the mean over depths and tokens of ‖h − h_before‖₂, [B].

    0 where nothing has changed, and so is its gradient there (the norm's, too, which has a kink).

    Args:
        reference: Before.
        norm: "norm" as TAR's code has it, though it calls it mse; "squared" for ‖h − h_before‖₂².
        width: Average over rows padded to this many tokens, pads included, as that code does (its rows have a fixed
            length). None leaves pads out.

    Raises:
        SettingsError: There is no such norm; when called, a row is longer than ``width``.

    Source:
        The second retain term of TAR, arXiv 2408.00761.
    """
    if norm not in {"norm", "squared"}:
        raise SettingsError(f"norm = {norm!r}: the drift is a norm, or squared")

    def of(network: nn.Module, batch: Batch) -> Tensor:
        padded = wide(batch, width, next(network.parameters()).device)
        with reference.standing() as before:
            then = depths(before, padded)
        now = depths(network, padded)

        def apart(layer: int) -> Tensor:
            off = now[layer] - then[layer]
            return torch.linalg.vector_norm(off, dim=-1) if norm == "norm" else (off**2).sum(-1)

        return _mean(apart, len(now), padded, width)

    return Loss("drift", of)


def random_mapping(network: nn.Module, *, seed: int = 0, width: int | None = None) -> Loss:
    """1 − |cos(h_l(token), R[token])|, mean over depths l and tokens: [B]. 0 where every state lies on its line.

    R has a row for each token of the vocabulary, N(0, 1), fixed, the same at every depth: what a token meant gives way
    to something that has nothing to do with its meaning.

    Args:
        network: R has its head's number of rows and its hidden size: for Llama-3-8B 2 GiB, kept on the CPU.
        seed: Of R; the caller's random numbers stay as they are.
        width: See :func:`drift`.

    Source:
        The initial safeguard of TAR, arXiv 2408.00761.
    """
    words = causal_lm(network).get_input_embeddings().weight.shape[0]
    size = causal_lm(network).config.get_text_config().hidden_size
    table = torch.randn(words, size, generator=torch.Generator().manual_seed(seed))

    def of(network: nn.Module, batch: Batch) -> Tensor:
        padded = wide(batch, width, next(network.parameters()).device)
        now = depths(network, padded)
        goal = table[padded.input_ids.cpu()].to(now[0])

        def off(layer: int) -> Tensor:
            return 1.0 - functional.cosine_similarity(now[layer], goal, dim=-1).abs()

        return _mean(off, len(now), padded, width)

    return Loss("random-mapping", of)


def _mean(at: Callable[[int], Tensor], n_depths: int, padded: Padded, width: int | None) -> Tensor:
    """Mean over depths and tokens of values [B, T]: all T with a fixed ``width``, else those that are no pads."""
    counted = padded.attention_mask.bool() | (width is not None)
    total = torch.stack([at(layer).masked_fill(~counted, 0.0).sum(1) for layer in range(n_depths)]).sum(0)
    return total / (counted.sum(1) * n_depths)
