"""Intervene: train an edit of one block's hidden states, again and again from other starts, and use the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Final, Literal, final

import torch

from immunity.attacks.curve import Recorder, Spent, budgets
from immunity.attacks.restricted import FITTED, FORWARD, Restricted, at_least_1, tokens, weights
from immunity.batch import Batch
from immunity.data.corpus import Corpora
from immunity.data.streams import Shuffled
from immunity.errors import DivergedError, SettingsError
from immunity.fit import Fit
from immunity.hidden import Replace, Site, replacing, sites, width
from immunity.interventions import descend, low_rank, parameter
from immunity.losses import nll
from immunity.models import LanguageModel
from immunity.theta import Theta

JUDGES: Final = 4
"""One restricted row in so many is kept to choose among the edits, and trains none."""


@final
@dataclass(frozen=True, kw_only=True)
class Intervene(Restricted):
    """Fit h ← h + W₂ᵀ (W₁ h + b) in one block, afresh for every depth and start; the model is used under the best.

    The best is that of least NLL of a quarter of the attacker's own compliant answers, which train no edit; measured
    prompts choose nothing. A defence that undid the interventions that it met is met by others: other starts, other
    orders of rows, more numbers, longer training. Whoever attacks so runs the model himself; nothing is in the weights
    afterwards, so no other attack can follow (``stays`` is False).

    Attributes:
        n: Restricted examples; with fewer at hand, what there is.
        where: Which hidden states: those that enter a block ("input") or leave it ("output").
        depths: Blocks that are tried, from 0 (first) to 1 (last).
        rank: Rows of W₁ and of W₂.
        restarts: Edits that are fitted in each block, each from a start and an order of rows of its own.
        steps: Optimiser steps of each (AdamW, constant rate).
        lr: Their learning rate.
        batch_size: Rows per step.
        seed: Of all starts and orders.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        The threat of E.T. (TechRxiv 1301297): one block's input, rank 2, 20 prompts, lr 4e-3, batch 10, as in its
        released ``config/base.yaml``. Its authors fit once per round against each model; that it is fitted again, on
        the hardened model, with new seeds, is ours.

    Departures from the paper:
        * Every position is edited, of prompts and of answers; there is a b, and no dropout.
        * One block serves all prompts, and it is chosen by the likelihood of answers, not by generated text.
    """

    name: ClassVar[str] = "intervene"
    unit: ClassVar[str] = "edits"
    stays: ClassVar[bool] = False
    n: int = 20
    where: Literal["input", "output"] = "input"
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    rank: int = 2
    restarts: int = 3
    steps: int = 30
    lr: float = 4e-3
    batch_size: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(float(depth) for depth in self.depths))
        at_least_1(n=self.n, rank=self.rank, restarts=self.restarts, batch_size=self.batch_size)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise SettingsError(f"depths = {self.depths}: give some, from 0, the first block, to 1, the last")
        if self.where not in {"input", "output"}:
            raise SettingsError(f"where = {self.where!r}: use input or output")
        self._how(0)  # its own settings are checked there

    @property
    def budgets(self) -> tuple[int, ...]:
        """Log-spaced numbers of edits."""
        return budgets(len(self.depths) * self.restarts)

    def _how(self, trial: int) -> Fit:
        return Fit(steps=self.steps, lr=self.lr, seed=self.seed + 1000 * trial)

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`; the model comes back as it was, without the edit."""
        recorder.reached(0, model)
        held = tokens(model, data)
        judged = max(1, len(held.rows) // JUDGES)
        judge = Batch(held.rows[:judged], "judge")
        rows = replace(held, rows=held.rows[judged:] or held.rows)
        best: dict[Site, Replace] = {}
        least, seen = math.inf, 0
        for done, (_, depth) in enumerate(product(range(self.restarts), self.depths), 1):
            (site,) = sites(model.network, self.where, [depth])
            stream = Shuffled(rows, self.batch_size, self.seed + 1000 * done)
            batches = [stream(step) for step in range(self.steps)]
            edit, value = self._fitted(model, site, batches, judge, done)
            if value < least:
                best, least = {site: edit}, value
            seen += sum(len(row.ids) for batch in batches for row in batch.rows)
            looked = done * sum(len(row.ids) for row in judge.rows)
            cost = weights(model) * (FITTED * seen + FORWARD * looked)
            spent = Spent(done * (self.steps * self.batch_size + len(judge)), seen + looked, cost)
            with replacing(model.network, best):
                recorder.reached(done, model, spent, {"block": float(site.layer), "nll/judge": value, "best": least})
        return model

    def _fitted(
        self, model: LanguageModel, site: Site, rows: list[Batch], judge: Batch, trial: int
    ) -> tuple[Replace, float]:
        """An edit, trained and then constant, and the NLL under it: infinite where training did not stay finite."""
        size, draw = width(model.network, site), torch.Generator().manual_seed(self.seed + 1000 * trial)
        w1 = parameter(model, torch.randn(self.rank, size, generator=draw) / math.sqrt(size))
        w2, b = parameter(model, torch.zeros(self.rank, size)), parameter(model, torch.zeros(self.rank))
        numbers = {"w1": w1, "w2": w2, "b": b}
        with replacing(model.network, {site: low_rank(w1, w2, b)}):
            try:
                descend(model.network, nll, rows, self._how(trial), numbers)
                value = Theta(model.network, trainable=numbers).value(nll, judge)
            except DivergedError:
                value = math.inf
        return low_rank(w1.detach(), w2.detach(), b.detach()), value
