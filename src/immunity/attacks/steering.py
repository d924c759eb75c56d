"""Steering: attacks that train activations. The weights stay as they were; what acts on hidden states is the attack.

Whoever runs a model on hardware of their own changes its hidden states as easily as its weights, with far fewer numbers
to fit. Nothing of it is in the weights afterwards, so no other attack can follow (``stays`` is False), and the model is
measured while the intervention is on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import nn

from immunity.attacks.curve import Recorder, budgets
from immunity.attacks.restricted import Restricted, Rows, at_least_1, identity
from immunity.data.corpus import Corpora
from immunity.errors import SettingsError
from immunity.fit import Batches, Fit, fit
from immunity.hidden import Replace, Site, n_heads, replacing, sites, width
from immunity.interventions import greatest, low_rank, parameter, scaled, shifted
from immunity.losses import nll
from immunity.models import LanguageModel
from immunity.theta import Theta, Vector


@final
@dataclass(frozen=True, kw_only=True)
class ReFT(Restricted):
    """Train a low-rank edit of every block's output: h ← h + W₂ᵀ (W₁ h + b).

    Attributes:
        n: Restricted examples; with fewer at hand, what there is.
        rank: Rows of W₁ and of W₂, for each block.
        steps: Optimiser steps (AdamW, constant rate).
        lr: Learning rate.
        batch_size: Rows per step.
        micro_batch: Rows per forward pass; memory only.
        seed: Of W₁ and of the examples' order.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2404.03592 (ReFT); as an attack, with these settings, in the released configuration of E.T.
        (``config/base.yaml``: rank 2, every block, lr 4e-3, 20 prompts, batch 10, 10 epochs).

    Departures from the paper:
        * W₂ starts at 0, so that budget 0 is the model as it was released.
        * Every position is edited, of prompts and of answers; there is no dropout.
        * Whether it succeeded is not decided here (E.T. asks for twice the toxicity at 5 % of the performance).
    """

    name: ClassVar[str] = "reft"
    unit: ClassVar[str] = "steps"
    stays: ClassVar[bool] = False
    n: int = 20
    rank: int = 2
    steps: int = 20
    lr: float = 4e-3
    batch_size: int = 10
    micro_batch: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        at_least_1(n=self.n, rank=self.rank, batch_size=self.batch_size)
        self.how()  # its own settings are checked there

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced steps."""
        return budgets(self.steps)

    def how(self) -> Fit:
        """The training loop's settings."""
        return Fit(steps=self.steps, lr=self.lr, seed=self.seed, micro_batch=self.micro_batch, save_every=20)

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; the model comes back as it was, without the edit."""
        network, draw = model.network, torch.Generator().manual_seed(self.seed)
        trainable: dict[str, nn.Parameter] = {}
        by: dict[Site, Replace] = {}
        for site in sites(network, "output"):
            size = width(network, site)
            w1 = parameter(model, torch.randn(self.rank, size, generator=draw) / math.sqrt(size))
            w2, b = parameter(model, torch.zeros(self.rank, size)), parameter(model, torch.zeros(self.rank))
            trainable |= {f"{site.layer}.w1": w1, f"{site.layer}.w2": w2, f"{site.layer}.b": b}
            by[site] = low_rank(w1, w2, b)
        rows = Rows(model, data, self.batch_size, self.seed)
        with replacing(network, by):
            fit(
                network,
                _descend,
                {"train": rows},
                self.how(),
                trainable=trainable,
                folder=recorder.folder,
                observe=recorder.follow(model, rows.spent),
                token=model.word_id,
                identity=identity(self, model, data),
            )
        return model


@final
@dataclass(frozen=True, kw_only=True)
class LoFiT(Restricted):
    """Choose the attention heads that matter, then train one vector for each of them, which is added to its output.

    First every head's output z is scaled, z ← (1 + a) z, and a is trained under an l1 penalty; the ``heads`` heads of
    greatest ‖a‖ are kept and a is thrown away. Then z ← z + v is trained on those.

    Attributes:
        n: Restricted examples; with fewer at hand, what there is.
        heads: How many are kept, over all blocks together; all of them where the model has fewer.
        scale_steps: Optimiser steps that choose the heads; they count as steps of the attack.
        scale_lr: Their learning rate.
        l1: Weight of Σ|a|.
        steps: Optimiser steps that train the vectors.
        lr: Their learning rate.
        batch_size: Rows per step.
        micro_batch: Rows per forward pass; memory only.
        seed: Of the examples' order.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2406.01563 (LoFiT) and its released scripts (a: l1 1e-3; v: lr 1e-2, l1 0; heads by ‖a‖); as an attack in
        TamperBench, which sweeps 5 to 30 heads, scale_lr 1e-4 to 1e-2, lr 1e-3 to 1e-1, l1 1e-4 to 1e-1.

    Departures from the paper:
        * a and v start at 0, not at noise of 1e-3, so that budget 0 is the model as it was released.
        * Nothing is measured while heads are chosen: what an attacker uses afterwards has the vectors only.
    """

    name: ClassVar[str] = "lofit"
    unit: ClassVar[str] = "steps"
    stays: ClassVar[bool] = False
    n: int = 100
    heads: int = 10
    scale_steps: int = 30
    scale_lr: float = 5e-3
    l1: float = 1e-3
    steps: int = 60
    lr: float = 1e-2
    batch_size: int = 8
    micro_batch: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        at_least_1(n=self.n, heads=self.heads, batch_size=self.batch_size)
        if not 0 <= self.l1 < math.inf:
            raise SettingsError(f"l1 = {self.l1}: the weight of a penalty is 0 or more")
        self.hows()  # their own settings are checked there

    @property
    def budgets(self) -> tuple[int, ...]:
        """0, then log-spaced steps from where the heads are chosen."""
        return (0, *(self.scale_steps + step for step in budgets(self.steps)[1:]))

    def hows(self) -> tuple[Fit, Fit]:
        """The training loop's settings: for the scales, then for the vectors."""
        both = ((self.scale_steps, self.scale_lr), (self.steps, self.lr))
        scales, vectors = (
            Fit(steps=steps, lr=lr, seed=self.seed, micro_batch=self.micro_batch, save_every=20) for steps, lr in both
        )
        return scales, vectors

    def penalised(self, theta: Theta, batch: Batches) -> Vector:
        """∇ of the NLL plus ``l1`` Σ|a|: what chooses the heads."""
        return _descend(theta, batch) + self.l1 * Vector([a.detach().sign() for a in theta.parameters])

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; the model comes back as it was, without the vectors."""
        network, heads = model.network, n_heads(model.network)
        rows = Rows(model, data, self.batch_size, self.seed)
        told = recorder.follow(model, rows.spent)

        def train(which: int, by: Mapping[Site, Replace], trainable: Mapping[str, nn.Parameter]) -> None:
            before = which * self.scale_steps

            def observe(done: int, trace: Mapping[str, float]) -> None:
                if done:
                    told(before + done, trace)

            with replacing(network, by):
                fit(
                    network,
                    (self.penalised, _descend)[which],
                    {"train": lambda step: rows(before + step)},
                    self.hows()[which],
                    trainable=trainable,
                    folder=None if recorder.folder is None else recorder.folder / ("scales", "vectors")[which],
                    observe=observe,
                    token=model.word_id,
                    identity=identity(self, model, data),
                )

        recorder.reached(0, model)
        a = {at: parameter(model, torch.zeros(heads, width(network, at) // heads)) for at in sites(network, "heads")}
        train(0, {at: scaled(a[at]) for at in a}, {f"{at.layer}.a": a[at] for at in a})
        kept = greatest(a, self.heads)
        v = {at: parameter(model, torch.zeros(len(kept[at]), a[at].shape[1])) for at in kept}
        train(1, {at: shifted(v[at], kept[at], heads) for at in v}, {f"{at.layer}.v": v[at] for at in v})
        return model


def _descend(theta: Theta, batch: Batches) -> Vector:
    return theta.grad(nll, batch["train"])
