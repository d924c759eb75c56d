"""Bounded losses to descend on where a model should stop knowing something: each has a floor, or a gradient that ends.

Ascending the cross-entropy itself has no end. What is here does: z are the logits at a response position, p = softmax
z, y the token that stands there, V the size of the vocabulary.

=========================  ==========================  ==========================================================
loss                       per position                where its gradient ends
=========================  ==========================  ==========================================================
:func:`clamped`            −min(−log p_y, c)           above the ceiling c, exactly
:func:`negative_entropy`   Σ_v p_v log p_v ≥ −ln V     at uniform p; it also vanishes where p is *certain*
:data:`uniform`            logsumexp z − mean z − ln V at uniform p only: the gradient is p − 1/V
:func:`inverse_ce`         −log(1 − p_y), or           once p_y is small;
                           −log softmax(−z)_y          once z_y is far below the others
=========================  ==========================  ==========================================================

All give one value per example, [B], like every loss, and build no [B, T, V] logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunity.batch import IGNORE, Batch, Padded
from immunity.errors import SettingsError
from immunity.losses import Loss, causal_lm, chunked, response_states, row_means, token_entropy

CUT_OFF: Final = -15.0
"""log p_y below which −log(1 − p_y) is not looked at any more: the cut-off of TAR's code for its baseline."""


def clamped(ceiling: float | None = None, *, per: Literal["token", "example"] = "token") -> Loss:
    """−min(ℓ, c): raises the cross-entropy ℓ of the response as far as c nats, where the gradient ends.

    Args:
        ceiling: c in nats; None is ln V, the cross-entropy of a model that knows nothing.
        per: Clamp each "token", or the mean over each "example" (its hard tokens then pay for its easy ones).

    Raises:
        SettingsError: The ceiling is not positive.

    Source:
        The clamp at ln V is how TAR (arXiv 2408.00761) ports MLAC to language models.
    """
    if ceiling is not None and not ceiling > 0:
        raise SettingsError(f"ceiling = {ceiling}: a cross-entropy is raised to a positive number of nats")

    def most(n_words: int) -> float:
        return math.log(n_words) if ceiling is None else ceiling

    def each(scores: Tensor, targets: Tensor) -> Tensor:
        lost = functional.cross_entropy(scores, targets, reduction="none")
        return -lost.clamp(max=most(scores.shape[-1])) if per == "token" else -lost

    def of(network: nn.Module, batch: Batch) -> Tensor:
        values = _over_responses(each)(network, batch)
        return values if per == "token" else values.clamp(min=-most(head_size(network)))

    return Loss("clamped-nll", of)


def negative_entropy(width: int | None = None) -> Loss:
    """−H(p) in nats, averaged over the response positions of each row; its floor is −ln V.

    The gradient vanishes where the model is certain: at a logit gap of 20 it is 1e-7 of :data:`uniform`'s.

    Args:
        width: Average over all positions of rows padded to this many tokens instead: prompts, pads and the last
            position included, as TAR's released code does (its rows have a fixed length, 256). A number and not a
            yes, because pads up to the longest row of a batch would make an example's value depend on the others.

    Raises:
        SettingsError: When called: a row is longer than ``width``.
    """

    def each(scores: Tensor, targets: Tensor) -> Tensor:
        return -token_entropy(scores, targets)

    def everywhere(network: nn.Module, batch: Batch) -> Tensor:
        padded = wide(batch, width, next(network.parameters()).device)
        states = _backbone(network)(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False
        ).last_hidden_state  # [B, width, D]
        flat = states.flatten(0, 1)
        return chunked(network, flat, padded.input_ids.flatten(), each).view(len(batch), -1).mean(1)

    return Loss("negative-entropy", _over_responses(each) if width is None else everywhere)


def _from_uniform(scores: Tensor, _targets: Tensor) -> Tensor:
    return scores.logsumexp(-1) - scores.mean(-1) - math.log(scores.shape[-1])


def inverse_ce(form: Literal["paper", "released"] = "paper") -> Loss:
    """Inverse cross-entropy, SOPHON's first loss (arXiv 2404.12699). Two different losses go by this name.

    Args:
        form: "paper": −log(1 − p_y), exactly 0 where log p_y is below :data:`CUT_OFF`. "released": the cross-entropy
            of 1 − z, which is −log softmax(−z)_y: it asks for the *least* likely token to be y.

    Raises:
        SettingsError: There is no such form.
    """
    if form not in {"paper", "released"}:
        raise SettingsError(f"form = {form!r}: the inverse cross-entropy is that of the paper or the released one")
    return Loss("inverse-ce", _over_responses(_without if form == "paper" else _opposite))


def _without(scores: Tensor, targets: Tensor) -> Tensor:
    """−log(1 − p_y) = logsumexp(z) − logsumexp(z without z_y): no 1 − p that rounds to 0, at either end."""
    place = targets[:, None]
    everything = scores.logsumexp(-1)
    others = scores.scatter(-1, place, -torch.inf).logsumexp(-1)
    known = scores.gather(-1, place)[:, 0] - everything >= CUT_OFF
    return torch.where(known, everything - others, 0.0)


def _opposite(scores: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(-scores, targets, reduction="none")


def _over_responses(each: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """Of (logits [n, V], targets [n]) -> [n] the mean over each row's response positions."""

    def of(network: nn.Module, batch: Batch) -> Tensor:
        states, targets, keep = response_states(network, batch)
        return row_means(chunked(network, states, targets, each), keep)

    return of


uniform: Final = Loss("kl-from-uniform", _over_responses(_from_uniform))
"""KL(uniform ‖ p) in nats, averaged over the response positions of each row: 0 where every token is equally likely.

SOPHON's second loss. It does not saturate where the model is certain, which :func:`negative_entropy` does, being ln V −
KL(p ‖ uniform) with its sign turned.
"""


def head_size(network: nn.Module) -> int:
    """V: how many logits the head gives, tokens that no tokenizer uses included."""
    return int(causal_lm(network).get_output_embeddings().weight.shape[0])


def wide(batch: Batch, width: int | None, device: torch.device | str = "cpu") -> Padded:
    """A batch padded to ``width`` tokens, whatever its longest row; None pads to that one.

    Raises:
        SettingsError: A row is longer.
    """
    padded = batch.padded(device)
    if width is None:
        return padded
    more = width - padded.input_ids.shape[1]
    if more < 0:
        raise SettingsError(f"a row of {padded.input_ids.shape[1]} tokens does not fit into the width {width}")
    ids, mask, labels = (functional.pad(t, (0, more), value=v) for t, v in zip(padded, (0, 0, IGNORE), strict=True))
    return Padded(ids, mask, labels)


def _backbone(network: nn.Module) -> nn.Module:
    found: nn.Module = causal_lm(network).base_model
    return found
