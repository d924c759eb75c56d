"""The residual stream at every depth, and what each of its states would say if it were the last: the logit lens.

A network of L blocks has L + 1 states at a position: h_0 enters the first block, h_j leaves the j-th, and the model's
own logits are W ν(h_L), with the final norm ν and the head W. The lens reads W ν(h_j) for the others.

    with reading(network, stream(network)) as seen:
        ...
    saying(network, h, labels, final_norm(network))  # [N], one depth's cross-entropy at N response positions

The backward pass computes a depth's logits again: of L + 1 depths one is held at a time, and of it a chunk at a time.

Shapes: B examples, T tokens, N response positions in the batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from immunity.batch import IGNORE, Padded
from immunity.errors import ModelError
from immunity.hidden import Site, n_layers, reading, replacing
from immunity.losses import causal_lm, chunked


class _FarEnoughError(Exception):
    """Ends a forward pass whose later blocks nobody reads."""


def stream(network: nn.Module, n: int | None = None) -> tuple[Site, ...]:
    """The sites of h_0 … h_n, all before the final norm; None: up to h_L.

    Raises:
        ModelError: The blocks cannot be found.
    """
    found = n_layers(network) if n is None else n
    return (Site(0, "input"), *(Site(layer, "output") for layer in range(found)))


def check_norm(norm: nn.Module, raw: Tensor, last: Tensor) -> None:
    """Compare ν(h_L) with the states that the head was given, at one position: raw and last [B, T, D].

    Raises:
        ModelError: They differ: there is more than this norm between the last block and the head.
    """
    with torch.no_grad():
        found, wanted = norm(raw[:1, :1]), last[:1, :1]
        error = float((found - wanted).abs().max())
        limit = 100 * torch.finfo(wanted.dtype).eps * (1.0 + float(wanted.abs().max()))
    if error > limit:
        raise ModelError(
            f"{type(norm).__name__} is not all that lies between the last block and the head (difference {error:.3g}): "
            "the logit lens cannot read this family"
        )


def saying(network: nn.Module, states: Tensor, labels: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Cross-entropy of the responses under W ν(h), in nats: [N], fp32 (float64 for float64).

    Args:
        network: Its head W is used.
        states: h of one depth, [B, T, D].
        labels: As :class:`~immunity.batch.Padded` has them: [B, T], whole numbers.
        norm: ν; None for states that have been through it.
    """
    keep = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][keep]

    def run(h: Tensor) -> Tensor:
        chosen = h[:, :-1][keep]
        return chunked(network, chosen if norm is None else norm(chosen), targets, _cross_entropy)

    # States are alive anyway, logits and what the norm saves are not. Nothing in there is random.
    return cast(Tensor, checkpoint(run, states, use_reentrant=False, preserve_rng_state=False))


def passed(network: nn.Module, padded: Padded, places: Sequence[Site]) -> dict[Site, Tensor]:
    """Hidden states [B, T, D] at some places, with their graph, by a forward pass that ends behind the last of them.

    Under gradient checkpointing the pass is a whole one.

    Raises:
        ModelError: The network has no such site.
    """
    model = causal_lm(network)
    end = Site(max(site.layer for site in places) + 1, "input")
    again = any(vars(module).get("gradient_checkpointing") for module in model.modules())
    stops = end.layer < n_layers(network) and not again
    end_there = replacing(network, {end: _stop} if stops else {})
    with reading(network, places) as seen, end_there, suppress(_FarEnoughError):
        model.base_model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
    return seen


def _stop(_h: Tensor) -> Any:  # noqa: ANN401 - it never returns
    raise _FarEnoughError


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(scores, targets, reduction="none")
