"""What a model may fall to: losses that are least where it has stopped being a language model in one way or another.

==========  ==============================================  ========================================================
attractor   loss, averaged over the response of a row       where it is 0
==========  ==============================================  ========================================================
"words"     KL(q ‖ p), q even over some words                those words, each as likely; with one word CTRAP's loss
"uniform"   KL(U ‖ p)                                        the maximum of entropy: every token is as likely
"random"    1 − |cos(h, R[token])|, over depths and tokens   hidden states lie where a fixed random map sends tokens
==========  ==============================================  ========================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from immunity.batch import Batch
from immunity.bounded import uniform
from immunity.drift import random_mapping
from immunity.errors import SettingsError
from immunity.losses import Loss, chunked, collapse, response_states, row_means


def attractor(name: str, network: nn.Module, tokens: Sequence[int]) -> Loss:
    """The loss of an attractor.

    Args:
        name: "words", "uniform" or "random".
        network: Its vocabulary and width are the random map's, whose seed is fixed.
        tokens: Ids of the words of "words".

    Raises:
        SettingsError: There is no such attractor, or it has no words.
    """
    if name == "words":
        return spread(tokens)
    if name == "uniform":
        return uniform
    if name == "random":
        return random_mapping(network)
    raise SettingsError(f"there is no attractor {name!r}: use words, uniform or random")


def spread(tokens: Sequence[int]) -> Loss:
    """KL(q ‖ p) in nats, averaged over the response positions of each row: [B]. q is even over ``tokens``.

    Of one token it is :func:`~immunity.losses.collapse`, the same computation.

    Raises:
        SettingsError: There is no token, or one is there twice.
    """
    ids = tuple(tokens)
    if not ids or len(set(ids)) < len(ids):
        raise SettingsError(f"a model falls to one word, or to several different ones, not to the token ids {ids}")
    if len(ids) == 1:
        return collapse(ids[0])

    def each(scores: Tensor, _targets: Tensor) -> Tensor:
        wanted = torch.tensor(ids, device=scores.device)
        return scores.logsumexp(-1) - scores[:, wanted].mean(-1) - math.log(len(ids))

    def of(network: nn.Module, batch: Batch) -> Tensor:
        states, targets, keep = response_states(network, batch)
        return row_means(chunked(network, states, targets, each), keep)

    return Loss("collapse-words", of)
