"""Coordinates: weights that are trained through other numbers, W = W₀ + f(c); an optimiser moves c.

The gradient in c is the one in W, pulled back through f. The network holds W itself whenever it is run or measured, so
that nothing has to be taken off or merged afterwards, and no hook is on it.

    coordinates = Coordinates(network, {name: Change(…), …})
    train(coordinates, model, streams, how, recorder, …)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Protocol, final

import torch
from torch import Tensor, nn

from immunity.attacks.curve import Recorder, Spent, budgets
from immunity.attacks.finetune import FineTune
from immunity.attacks.restricted import Restricted, identity
from immunity.data.corpus import Corpora
from immunity.errors import ModelError
from immunity.fit import Batches, Fit, Streams, fit
from immunity.losses import nll
from immunity.models import LanguageModel
from immunity.networks import linear_layers
from immunity.theta import Theta, Vector


class Change(Protocol):
    """What is added to a weight, as a function of numbers that are trained."""

    @property
    def numbers(self) -> Mapping[str, nn.Parameter]:
        """The numbers, by name."""

    def __call__(self) -> Tensor:
        """[out, in], with its graph; 0 before the first step."""


@final
class Coordinates:
    """A direction for :func:`immunity.fit.fit`: ∇nll of the stream "train", in other coordinates.

    Args:
        network: Without an adapter. What of it is trainable and has no change here is trained as it is.
        changes: Name of a trainable matrix of the network -> what is added to it.

    Attributes:
        trainable: What an optimiser moves, by name.

    Raises:
        ModelError: A name is that of no trainable matrix.
    """

    def __init__(self, network: nn.Module, changes: Mapping[str, Change]) -> None:
        weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if unknown := [name for name in changes if name not in weights]:
            raise ModelError(f"{unknown[0]} is no trainable weight of the network: its coordinates cannot be changed")
        turned = {id(layer.get_parameter("weight")) for layer in linear_layers(network).values() if _turned(layer)}
        self._network, self._changes = network, dict(changes)
        self._turned = {name for name in changes if id(weights[name]) in turned}
        self._weights = {name: weights[name] for name in changes}
        self._start = {name: p.detach().clone() for name, p in self._weights.items()}
        self.trainable = {name: p for name, p in weights.items() if name not in changes}
        for name, change in changes.items():
            self.trainable |= {f"{name}.{number}": p for number, p in change.numbers.items()}

    def put(self) -> None:
        """Make the network's weights what the numbers say now."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._start[name] + self._upright(name, self._changes[name]()))

    def __call__(self, theta: Theta, batch: Batches) -> Vector:
        """The gradient in the coordinates of ``theta``, which are :attr:`trainable`."""
        self.put()
        here = Theta(self._network, micro_batch=theta.micro_batch, autocast=theta.autocast)
        found = dict(zip(here.names, here.grad(nll, batch["train"]).tensors(), strict=True))
        theta.trace.update(here.trace)
        for name, change in self._changes.items():
            numbers = change.numbers
            pulled = torch.autograd.grad(change(), [*numbers.values()], self._upright(name, found.pop(name)))
            found |= {f"{name}.{number}": g for number, g in zip(numbers, pulled, strict=True)}
        return Vector([found[name] for name in theta.names])

    def _upright(self, name: str, value: Tensor) -> Tensor:
        """A weight as [out, in], and back: GPT-2's layers hold [in, out]."""
        return value.T if name in self._turned else value


class Reparametrised(Restricted):
    """A fine-tune on restricted examples in other coordinates than the weights.

    Attributes:
        steps: Optimiser steps.
    """

    steps: int

    @abstractmethod
    def coordinates(self, model: LanguageModel, data: Corpora) -> Coordinates:
        """What is trained, on a model whose every weight may be; follows from the settings, model and data alone."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced steps."""
        return budgets(self.steps)

    def plain(self) -> FineTune:
        """The fine-tune of every weight with the same settings, as far as it has them."""
        known = {field.name for field in fields(FineTune)}
        return FineTune(**{name: value for name, value in asdict(self).items() if name in known})  # type: ignore[call-overload]

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; steps and order of data follow from the settings alone."""
        plain = self.plain()
        model = plain.trained(model)
        coordinates = self.coordinates(model, data)
        streams = plain.streams({"train": data["harmful"]}, model)
        train(
            coordinates,
            model,
            streams,
            plain.how(),
            recorder,
            spent=plain.spent(model, streams["train"]),
            identity=identity(self, model, data),
        )
        return model


def train(
    coordinates: Coordinates,
    model: LanguageModel,
    streams: Streams,
    how: Fit,
    recorder: Recorder,
    *,
    spent: Callable[[int], Spent],
    identity: Mapping[str, object],
) -> None:
    """Descend for ``how.steps`` steps; the network is measured, and left, with the weights that the numbers say.

    Args:
        coordinates: Of the model's network; a run that goes on from a checkpoint must start at the same ones.
        model: What is measured.
        streams: With the role "train".
        how: Settings.
        recorder: See :meth:`immunity.attacks.attack.Attack.tamper`.
        spent: Steps done -> what they cost.
        identity: See :func:`immunity.fit.fit`.
    """
    told = recorder.follow(model, spent)

    def observe(done: int, trace: Mapping[str, float]) -> None:
        coordinates.put()
        told(done, trace)

    fit(
        model.network,
        coordinates,
        streams,
        how,
        trainable=coordinates.trainable,
        folder=recorder.folder,
        observe=observe,
        token=model.word_id,
        identity=identity,
    )
    coordinates.put()


def name_of(network: nn.Module, layer: nn.Module) -> str:
    """The name of a linear layer's weight among the network's parameters; a tied one has a single name."""
    weight = layer.get_parameter("weight")
    return next(name for name, p in network.named_parameters() if p is weight)


def upright(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], whichever way it holds it: a view, without gradient."""
    weight = layer.get_parameter("weight").detach()
    return weight.T if _turned(layer) else weight


def _turned(layer: nn.Module) -> bool:
    """Whether a linear layer holds [in, out], as GPT-2's do."""
    return not isinstance(layer, nn.Linear)
