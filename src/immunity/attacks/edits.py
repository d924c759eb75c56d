"""Prune and Quantise: the released weights made smaller, which may undo what hangs on few or small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from immunity.attacks.attack import THREATS, Attack, Manner, needed
from immunity.attacks.curve import Recorder, Spent
from immunity.attacks.probing import Reader
from immunity.data.corpus import Corpora, Corpus
from immunity.errors import ModelError, SettingsError
from immunity.method import parts
from immunity.models import LanguageModel
from immunity.weights import Kept, input_squares, matrices, prune, quantise

Harmless = Literal["benign", "general"]
"""Which of the attacker's harmless prompts are read."""


@dataclass(frozen=True, kw_only=True)
class Prune(Attack):
    """Set a share of each linear layer's weights to 0; embeddings, norms and the head stay.

    Attributes:
        kind: "magnitude" prunes the smallest |W_ij| of each matrix; "wanda" the smallest |W_ij| · ‖x_j‖₂ of each
            output's row, x being the layer's input over the attacker's prompts.
        shares: Per cent pruned, one model each, all from the released weights.
        n: Prompts that "wanda" reads, or all if there are fewer.
        harmless: Role of these prompts; no response is read.
        batch_size: Prompts per forward pass; memory only.
        seed: Of no effect: nothing is drawn.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        arXiv 2306.11695 (Wanda), eq. 1; as an attack on safety: arXiv 2402.05162.

    Departures from the paper:
        * ‖x_j‖₂ over the attacker's prompts as the template writes them, not over 128 pieces of C4 of 2,048 tokens.
        * All norms are taken on the released model; Wanda goes through the blocks in turn, each seeing pruned inputs.
    """

    name: ClassVar[str] = "prune"
    unit: ClassVar[str] = "% of weights pruned"
    kind: Literal["magnitude", "wanda"] = "magnitude"
    shares: tuple[int, ...] = (10, 20, 30, 50, 70)
    n: int = 128
    harmless: Harmless = "benign"
    batch_size: int = 16
    seed: int = 1

    def __post_init__(self) -> None:
        rising("shares", self.shares, most=99)
        if self.kind not in {"magnitude", "wanda"} or self.harmless not in {"benign", "general"}:
            raise SettingsError(
                f"kind = {self.kind!r}, harmless = {self.harmless!r}: use magnitude or wanda, benign or general"
            )
        if self.n < 1 or self.batch_size < 1:
            raise SettingsError(f"n = {self.n}, batch_size = {self.batch_size}: both must be at least 1")

    @property
    def manner(self) -> Manner:
        """Nothing restricted is read."""
        return Manner(THREATS["edit"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """0 and the shares."""
        return (0, *self.shares)

    def reads(self, data: Corpora) -> Corpora:
        """For "wanda" the harmless prompts, without their responses.

        Raises:
            DataError: They are missing.
        """
        if self.kind == "magnitude":
            return {}
        return {self.harmless: prompts_only(needed(data, self.harmless, why="pruning by activations"), self.n)}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`."""
        found = matrices(model.network)
        norms: dict[str, Tensor] = {}
        spent = Spent()
        if self.kind == "wanda":
            norms, spent = self._norms(model, data)

        def edit(share: int) -> dict[str, float]:
            for matrix in found:
                size = matrix.weight.detach().abs()
                wanda = matrix.name in norms
                score = size * norms[matrix.name] if wanda else size
                prune(matrix.weight, share / 100, score, per_row=wanda)
            zero = sum(int((matrix.weight == 0).sum()) for matrix in found)
            return {"zeros": zero / sum(matrix.weight.numel() for matrix in found)}

        return stepped(model, [matrix.weight for matrix in found], recorder, edit, spent)

    def _norms(self, model: LanguageModel, data: Corpora) -> tuple[dict[str, Tensor], Spent]:
        """‖x_j‖₂ of each linear layer's input [in], over all prompts; no pad is among them."""
        reader = Reader(model, self.batch_size)
        prompts = reader.prompts(corpus for corpora in data.values() for corpus in parts(corpora))
        with input_squares(matrices(model.network)) as squares:
            reader.read_unpadded(prompts)
        unseen = [name for name, values in squares.items() if not bool(values.any())]
        if unseen:
            raise ModelError(
                f"nothing was seen to go into {unseen[0]}: {type(model.network).__name__} does not use this layer as "
                "others do; prune by kind=magnitude"
            )
        return {name: values.sqrt() for name, values in squares.items()}, reader.spent


@dataclass(frozen=True, kw_only=True)
class Quantise(Attack):
    """Round every linear layer's weights to few bits, to the nearest, each output's row on its own symmetric grid.

    What is measured are the rounded weights in the dtype that the model was opened in: what quantisation does to
    behaviour, not to speed.

    Attributes:
        bits: Falling; one model each, all from the released weights.
        seed: Of no effect: nothing is drawn.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        Plain round-to-nearest, as the baseline of arXiv 2210.17323 (GPTQ); as an attack on safety and unlearning:
        arXiv 2404.04392, 2410.16454.

    Departures from the paper:
        * Activations, embeddings and the head stay as they are; no calibration, no groups within a row.
    """

    name: ClassVar[str] = "quantise"
    unit: ClassVar[str] = "bits fewer than 16"
    bits: tuple[int, ...] = (8, 4, 3)
    seed: int = 1

    def __post_init__(self) -> None:
        if any(not 2 <= b <= 15 for b in self.bits):
            raise SettingsError(f"bits = {self.bits}: each lies between 2 and 15")
        rising("bits (counted from 16 downwards)", self.budgets[1:], most=14)

    @property
    def manner(self) -> Manner:
        """Nothing is read."""
        return Manner(THREATS["edit"])

    @property
    def budgets(self) -> tuple[int, ...]:
        """How many bits fewer than 16: 8 bits are 8 fewer, 4 bits are 12 fewer."""
        return (0, *(16 - b for b in self.bits))

    def reads(self, data: Corpora) -> Corpora:  # noqa: ARG002 - part of the interface
        """No data."""
        return {}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:  # noqa: ARG002
        """See :meth:`Attack.tamper`."""
        found = matrices(model.network)

        def edit(fewer: int) -> dict[str, float]:
            moved = whole = 0.0
            for matrix in found:
                before = matrix.weight.detach().clone()
                quantise(matrix.weight, 16 - fewer)
                moved += float((matrix.weight - before).square().sum())
                whole += float(before.square().sum())
            return {"bits": 16.0 - fewer, "relative_error": (moved / whole) ** 0.5 if whole else 0.0}

        return stepped(model, [matrix.weight for matrix in found], recorder, edit)


def stepped(
    model: LanguageModel,
    tensors: Sequence[Tensor],
    recorder: Recorder,
    edit: Callable[[int], Mapping[str, float]],
    spent: Spent | None = None,
) -> LanguageModel:
    """Measure the model as it is, then at each further budget an edit of it, always from the same original weights.

    Args:
        model: Edited in place; it stays at the last edit.
        tensors: All that the edit changes.
        recorder: Knows the budgets.
        edit: Strength -> what is worth showing; changes ``tensors`` in place.
        spent: What it cost to be able to edit.
    """
    recorder.reached(0, model)
    kept = Kept(tensors)
    for strength in recorder.at[1:]:
        kept.restore()
        with torch.no_grad():
            trace = edit(strength)
        recorder.reached(strength, model, spent, trace)
    return replace(model, pristine=False)


def rising(name: str, values: Sequence[int], *, most: int) -> None:
    """Look at strengths that are to become budgets.

    Raises:
        SettingsError: They are not increasing whole numbers between 1 and ``most``, or there is none.
    """
    if not values or values[0] < 1 or values[-1] > most or any(a >= b for a, b in pairwise(values)):
        raise SettingsError(f"{name} = {tuple(values)}: give increasing numbers between 1 and {most}")


def prompts_only(corpus: Corpus, n: int) -> Corpus:
    """The first ``n`` examples, or all if there are fewer, without their responses."""
    cut = corpus.take(min(n, len(corpus)))
    fields: dict[str, Any] = {"response": "", "tags": {}}
    return replace(cut, examples=tuple(replace(example, **fields) for example in cut))
