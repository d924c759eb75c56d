"""Patches: fine-tuning by a change of low rank whose length, beside that of each weight, is what the attacker says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from immunity.attacks.coordinates import Change, Coordinates, Reparametrised, name_of, upright
from immunity.attacks.restricted import at_least_1
from immunity.data.corpus import Corpora
from immunity.errors import SettingsError
from immunity.losses import causal_lm
from immunity.models import LanguageModel
from immunity.patches import Targets, sizes


@final
@dataclass(frozen=True, kw_only=True)
class LowRankPatch(Reparametrised):
    """Fine-tune V and U in W = W₀ + V U, with ‖V U‖ ≤ radius ‖W₀‖ for every matrix.

    What a LoRA does, but its length is measured in the weights' own: entries of V are in units of the radius, so that
    after 1 / lr steps a patch can be as long as it may. A defence that was prepared for patches up to some radius, or
    of some rank, or on some layers, is met beyond it. Whoever attacks so has the weights, a few restricted rows, and
    the defence's own account of how far it looked.

    Attributes:
        n: Restricted examples; with fewer at hand, what there is.
        rank: Of V U.
        radius: The most that ‖V U‖/‖W₀‖ may be.
        targets: Which linear layers are patched: "attention" or "all-linear".
        steps: Optimiser steps (AdamW, constant rate).
        lr: Learning rate, in shares of the radius for V.
        batch_size: Rows per step.
        seed: Of U and of the examples' order.
        micro_batch: Rows per forward pass; memory only.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        Our own, against AntiDote (arXiv 2509.08000), whose patches have a rank, a cap and targets; the
        parametrisation is that of its adversary here (:mod:`immunity.hypernetwork`).

    Departures from the paper:
        * One patch for all prompts, trained by gradient descent on compliant answers; theirs is written for each prompt
          by a network. Whoever fine-tunes a released model has one.
    """

    name: ClassVar[str] = "patch"
    unit: ClassVar[str] = "steps"
    n: int = 100
    rank: int = 16
    radius: float = 0.3
    targets: Targets = "all-linear"
    steps: int = 60
    lr: float = 0.02
    batch_size: int = 8
    seed: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        at_least_1(rank=self.rank)
        if not 0 < self.radius < math.inf:
            raise SettingsError(f"radius = {self.radius}: a patch has a positive length")
        if self.targets not in {"attention", "all-linear"}:
            raise SettingsError(f"targets = {self.targets!r}: use attention or all-linear")
        self.plain()  # the others are checked there

    def coordinates(self, model: LanguageModel, data: Corpora) -> Coordinates:  # noqa: ARG002 - patches begin anywhere
        """A patch on each layer, and nothing else trainable."""
        network = model.network
        draw, modules = torch.Generator().manual_seed(self.seed), dict(causal_lm(network).named_modules())
        changes: dict[str, Change] = {
            name_of(network, modules[layer]): _Patch(upright(modules[layer]), self.rank, self.radius, draw)
            for layer in sizes(network, self.targets)
        }
        for name, weight in network.named_parameters():
            weight.requires_grad_(name in changes)
        return Coordinates(network, changes)


class _Patch:
    """V U, shortened to the cap where it is longer; V from 0. Entries of U are in units of their own size at first."""

    def __init__(self, weight: Tensor, rank: int, radius: float, draw: torch.Generator) -> None:
        n_out, n_in = weight.shape
        self._cap = radius * float(torch.linalg.vector_norm(weight))
        self._u = nn.Parameter(torch.randn(rank, n_in, generator=draw).to(weight))
        self._v = nn.Parameter(weight.new_zeros(n_out, rank))
        # a V of ones is about at the cap
        self._units = self._cap / math.sqrt(n_out * rank), 1.0 / math.sqrt(n_in)

    @property
    def numbers(self) -> Mapping[str, nn.Parameter]:
        return {"u": self._u, "v": self._v}

    def __call__(self) -> Tensor:
        v, u = self._v * self._units[0], self._u * self._units[1]
        square = ((v.T @ v) * (u @ u.T)).sum()  # ‖V U‖²
        return v @ u * (self._cap * square.clamp(min=max(self._cap**2, 1e-30)).rsqrt())
