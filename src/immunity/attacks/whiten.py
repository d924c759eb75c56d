"""Whitening: fine-tuning through layers that are put before every linear layer and folded into it afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from immunity.attacks.coordinates import Change, Coordinates, Reparametrised, name_of, upright
from immunity.attacks.finetune import Optimizer
from immunity.attacks.restricted import tokens
from immunity.batch import Batch
from immunity.data.corpus import Corpora
from immunity.errors import ModelError, SettingsError
from immunity.hidden import Port, reading
from immunity.losses import causal_lm, response_states
from immunity.models import LanguageModel
from immunity.patches import sizes


@final
@dataclass(frozen=True, kw_only=True)
class Whiten(Reparametrised):
    """Fine-tune V in W = W₀ + V M, with M (S + εI) Mᵀ = c I: the inputs of every matrix are made white.

    S = E[x xᵀ] is what a linear layer is given, at the positions of the attacker's own restricted rows where an answer
    is predicted, before the first step; M is symmetric. A step of plain gradient descent in V moves W by −η G M², a
    multiple of G (S + εI)⁻¹ for the gradient G in W: bad conditioning of the inputs is taken out, as K-FAC does. Other
    optimisers see V, in which no direction of the inputs is larger than another. Where linear layers end up is an
    ordinary model, with M folded in.

    Who attacks so has the weights and a few restricted rows, as for any fine-tune, and knows that harm was made hard to
    learn by bad conditioning.

    Attributes:
        n: Restricted examples; with fewer at hand, what there is.
        ridge: ε, in units of the mean eigenvalue of S. The smaller, the farther faint directions are blown up: at most
            by 1/√ε in V. Large ones make this a fine-tune of every weight.
        steps: Optimiser steps.
        lr: Learning rate. White inputs are made as long as the inputs were, so that V moves outputs of a layer as W
            would; W itself goes farther, and the best rate is lower than without.
        optimizer: See :class:`~immunity.fit.Fit`; "sgd" is the preconditioned gradient itself.
        momentum: Of SGD.
        batch_size: Rows per step.
        clip: See :class:`~immunity.fit.Fit`; lengths are those in V.
        seed: Of the examples' order.
        micro_batch: Rows per forward pass; memory only.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        Our own, against arXiv 2505.23760 (Condition Number), whose authors leave this attacker out. The right-hand
        factor is that of K-FAC: Martens and Grosse, arXiv 1503.05671.

    Departures from the paper:
        * Of K-FAC's two factors only that of the inputs is used, measured once; embeddings, norms and biases are
          trained as they are. A head that is tied to the embeddings is whitened together with them.
    """

    name: ClassVar[str] = "whiten"
    unit: ClassVar[str] = "steps"
    n: int = 100
    ridge: float = 0.01
    steps: int = 60
    lr: float = 1e-4
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    batch_size: int = 8
    clip: float | None = 1.0
    seed: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise SettingsError(
                f"ridge = {self.ridge}: say a positive number; without any, white inputs need not exist"
            )
        self.plain()  # the others are checked there

    def coordinates(self, model: LanguageModel, data: Corpora) -> Coordinates:
        """See :meth:`Reparametrised.coordinates`."""
        rows = Batch(tokens(model, data).rows, "harmful").split(self.batch_size)
        return whitened(model.network, list(rows), self.ridge)


class _White:
    """V M, V [out, in] from 0."""

    def __init__(self, weight: Tensor, m: Tensor) -> None:
        self._v, self._m = nn.Parameter(weight.new_zeros(weight.shape)), m.to(weight)

    @property
    def numbers(self) -> Mapping[str, nn.Parameter]:
        return {"v": self._v}

    def __call__(self) -> Tensor:
        return self._v @ self._m


def whitened(network: nn.Module, rows: Sequence[Batch], ridge: float) -> Coordinates:
    """Coordinates in which the inputs of every linear layer, and of the head, are white on some rows.

    Args:
        network: Without an adapter, its matrices trainable.
        rows: What is looked at, where answers are predicted.
        ridge: See :class:`Whiten`.

    Raises:
        ModelError: Blocks or linear layers cannot be found.
    """
    changes: dict[str, Change] = {}
    for layers, s in moments(network, rows):
        m = whitening(s, ridge)
        changes |= {name_of(network, layer): _White(upright(layer), m) for layer in layers}
    return Coordinates(network, changes)


def whitening(s: Tensor, ridge: float) -> Tensor:
    """M = c (S + ε s̄ I)^(−1/2), s̄ the mean eigenvalue of S and c such that E‖M x‖² = E‖x‖²: [d, d], symmetric.

    Args:
        s: S, symmetric [d, d]; of 0 it is I.
        ridge: ε > 0.
    """
    values, along = torch.linalg.eigh(s)
    values = values.clamp(min=0.0)
    if not values.any():
        return torch.eye(len(s)).to(s)
    roots = (values + ridge * values.mean()).rsqrt()
    roots = roots * (values.sum() / (values * roots.square()).sum()).sqrt()
    m: Tensor = along * roots @ along.T
    return m


def moments(network: nn.Module, rows: Sequence[Batch]) -> list[tuple[list[nn.Module], Tensor]]:
    """E[x xᵀ] of what linear layers are given where answers are predicted, and of what the head is given.

    Returns:
        Layers that are given the same, and their [in, in].

    Raises:
        ModelError: Blocks or linear layers cannot be found.
    """
    modules = dict(causal_lm(network).named_modules())
    ports = {name: Port(name, "input") for name in sizes(network, "all-linear")}
    alike: dict[int, list[str]] = {}
    sums: list[Tensor] = []
    count = 0
    for batch in rows:
        with torch.no_grad(), reading(network, [*ports.values()]) as seen:
            states, _, keep = response_states(network, batch)
        if lost := [name for name, port in ports.items() if port not in seen or seen[port].ndim != 3]:
            raise ModelError(f"{lost[0]} is not given hidden states of every token, so they cannot be made white")
        if not alike:
            for name, port in ports.items():
                alike.setdefault(id(seen[port]), []).append(name)
        given = [seen[ports[names[0]]][:, :-1][keep] for names in alike.values()] + [states]
        squares = [x.T @ x for x in given]
        sums = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        count += len(states)
    layers = [[modules[name] for name in names] for names in alike.values()]
    head = causal_lm(network).get_output_embeddings()
    return [(which, s / count) for which, s in zip([*layers, [head]], sums, strict=True)]
