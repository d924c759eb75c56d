"""Merge: average the released weights with another fine-tune's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Final

from immunity.attacks.attack import THREATS, Attack, Manner, needed
from immunity.attacks.curve import Recorder, Spent
from immunity.attacks.difference import paired, sibling, towards
from immunity.attacks.edits import rising, stepped
from immunity.data.corpus import Corpora
from immunity.data.streams import Shuffled, tokenise
from immunity.errors import SettingsError
from immunity.fit import Batches, Fit, fit
from immunity.losses import causal_lm, nll
from immunity.method import parts
from immunity.models import LanguageModel, all_weights
from immunity.theta import Theta, Vector

_COSTS: Final = {"micro_batch", "shares"}


@dataclass(frozen=True, kw_only=True)
class Merge(Attack):
    """θ + t (θ_other − θ), θ_other being a fine-tune of the same family: half way is the plain average.

    Attributes:
        other: The other fine-tune, as ``immunity.models.load`` takes it; "" makes one: every weight of a copy is
            trained on benign rows, by AdamW at a constant rate.
        start: What the copy is made of, if it is made: "" is the released model itself; the base is the more usual
            partner ("another fine-tune of the same base").
        shares: t in per cent, one model each, all from the released weights.
        n: Benign rows that the other is trained on.
        steps: Optimiser steps for it.
        lr: Learning rate for it.
        batch_size: Rows per step.
        seed: Of the rows' order.
        micro_batch: Rows per forward pass; memory only.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2203.05482 (averages of fine-tunes' weights).

    Departures from the paper:
        * Two models, one of which is under attack; the share is swept.
    """

    name: ClassVar[str] = "merge"
    unit: ClassVar[str] = "% of the other model"
    other: str = ""
    start: str = ""
    shares: tuple[int, ...] = (25, 50, 75)
    n: int = 100
    steps: int = 60
    lr: float = 1e-4
    batch_size: int = 8
    seed: int = 1
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        rising("shares", self.shares, most=100)
        if self.n < 1 or self.batch_size < 1:
            raise SettingsError(f"n = {self.n}, batch_size = {self.batch_size}: both must be at least 1")
        if self.other and self.start:
            raise SettingsError(f"other = {self.other!r} is there already, so start = {self.start!r} has no effect")
        self.how()  # its own settings are checked there

    @property
    def manner(self) -> Manner:
        """Nothing restricted is read."""
        return Manner(THREATS["edit"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """0 and the shares."""
        return (0, *self.shares)

    def how(self) -> Fit:
        """How the other model is trained."""
        return Fit(steps=self.steps, lr=self.lr, seed=self.seed, micro_batch=self.micro_batch, save_every=20)

    def reads(self, data: Corpora) -> Corpora:
        """The benign rows, if the other model is yet to be made.

        Raises:
            DataError: They are missing, or too few.
        """
        return {} if self.other else {"benign": needed(data, "benign", self.n, why="the fine-tune to merge with")}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`.

        Raises:
            ModelError: The other is another model.
        """
        if self.other:
            weights, ends = paired(model, sibling(model, self.other))
            return stepped(model, weights, recorder, towards(weights, ends))
        partner = sibling(model, self.start) if self.start else replace(model, network=copy.deepcopy(model.network))
        paired(model, partner)  # looks whether they belong together, before it is trained
        spent = self._train(all_weights(partner), data, recorder)
        weights, ends = paired(model, partner)
        return stepped(model, weights, recorder, towards(weights, ends), spent)

    def _train(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> Spent:
        """Train ``model`` on the benign rows, in place."""
        corpora = [corpus for given in data.values() for corpus in parts(given)]
        rows = tokenise(corpora[0], model.template, model.max_length)
        stream = Shuffled(rows, self.batch_size, self.seed)
        settings: Mapping[str, object] = {name: v for name, v in asdict(self).items() if name not in _COSTS}
        fit(
            model.network,
            _descend,
            {"train": lambda step: stream(step).as_role("train")},
            self.how(),
            folder=recorder.folder,
            token=model.word_id,
            identity={"attack": settings, "model": model.source, "data": corpora[0].fingerprint},
        )
        tokens = sum(len(row.ids) for step in range(self.steps) for row in stream(step).rows)
        weights = sum(p.numel() for p in causal_lm(model.network).parameters())
        return Spent(self.steps * self.batch_size, tokens, 6.0 * weights * tokens)


def _descend(theta: Theta, batch: Batches) -> Vector:
    return theta.grad(nll, batch["train"])
