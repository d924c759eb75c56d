"""LoX: push an aligned model further along the few directions in which alignment moved it. Nothing is trained.

W_LoX = W + α U_k U_kᵀ D        with  D = W − W_base = U S Vᵀ, for every matrix W

Perin et al., arXiv 2506.15606.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from immunity.errors import ImmunityError, ModelError, SettingsError
from immunity.extrapolation import Applied, Pair, Subtract, Svd, extrapolate, misfit, pairs
from immunity.mechanisms import LowRankEdit, Mechanism
from immunity.method import Card, Problem
from immunity.models import LanguageModel
from immunity.pretrained import adapter_kind
from immunity.stored import Stored
from immunity.weight_edit import WeightEdit

SURVIVES: Final = 0.99
"""Cosine between what was meant and what is stored, below which a run warns."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoX(WeightEdit):
    """Add α times the leading part, of rank k, of what alignment changed; matrix by matrix, in place.

    Attributes:
        base: What the aligned model was made from: a folder with a whole model (or tiny, smollm2), read one tensor at a
            time. For a chat model it should be the model before the alignment alone: the difference to a pretrained
            one holds all of instruction tuning.
        alpha: α. 0 changes nothing, bit for bit.
        rank: k. As many as a matrix has, or more, is the whole difference. The paper's rule for it, which has to ask
            models questions, is ``immunity.extrapolation.smallest_rank``.
        embeddings: Whether embeddings and head, which are matrices as well, are pushed. Without them the two models may
            have vocabularies of different size.
        svd: "exact", or "randomised" for matrices above 1024 (Halko et al.), which costs a fraction.
        subtract: D in "float32", or in "bfloat16" (the released code), where small differences are lost.

    Raises:
        SettingsError: α is negative, or the rank is below 1.

    Source:
        arXiv 2506.15606 in public notes, and its released code, VITA-Group/LoX; not checked against the PDF.

    Departures from the paper:
        * The default takes a randomised decomposition for large matrices, from a fixed seed; :meth:`paper` does not.
        * k is 6 as for LLaMA-2-7B aligned with 65.6 thousand pairs (3 for most others there); it is not searched for.
        * The released code loads both models and saves in bfloat16, which loses a part of the edit: where D is of the
          order 3e-5, 70 % of the weights do not move. Here the base is streamed, the result is as precise as the
          model was opened (float32 unless ``--dtype`` says otherwise), and a run warns if that is not enough.
        * Rank 0, which is all of D in that code, is no setting: a large rank is.
        * Its authors attack it by plain fine-tuning. The difference to the aligned model is of rank k: whoever has that
          model takes the edit out exactly.
    """

    card: ClassVar[Card] = Card(
        name="LoX",
        paper="LoX: Low-Rank Extrapolation Robustifies LLM Safety Against Fine-tuning",
        arxiv="2506.15606",
        year=2025,
        block="raises the cost of harmful convergence",
        family="geometric",
        gradients="0: one decomposition of each matrix, no training",
        says="Pushes an aligned model further along the few directions in which alignment moved it.",
    )
    strength: ClassVar[str] = "alpha"
    base: str = ""
    alpha: float = 1.25
    rank: int = 6
    embeddings: bool = True
    svd: Svd = "randomised"
    subtract: Subtract = "float32"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.rank < 1:
            raise SettingsError(
                f"alpha = {self.alpha} must not be negative and rank = {self.rank} must be at least 1: the leading "
                "part of a difference is pushed on, not taken back"
            )

    @classmethod
    def paper(cls) -> LoX:
        """The equation, decomposed exactly. α = 1.25, k = 6."""
        return cls(svd="exact")

    @classmethod
    def released(cls) -> LoX:
        """As coded: D is subtracted in bfloat16, then decomposed exactly. α and k of the paper's run."""
        return cls(svd="exact", subtract="bfloat16")

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """A change of low rank; none with α = 0."""
        return (LowRankEdit(k=self.rank),) if self.alpha else ()

    def problems(self, model: LanguageModel) -> list[Problem]:
        """α = 0; an adapter; a base that is missing, of another shape, or the same model."""
        found = [] if self.alpha else [Problem("alpha", "alpha = 0 changes nothing")]
        if adapter_kind(model.network):
            return [*found, Problem("adapter", "LoX edits weights and trains no adapter: merge it, or attach none")]
        if not self.base:
            return [*found, Problem("base", "say what the model was aligned from: --set base=FOLDER")]
        try:
            before = Stored(self.base)
            chosen = list(pairs(model.network, before, embeddings=self.embeddings))
            wrong = next((why for why in (misfit(pair, before) for pair in chosen) if why), "")
            if not wrong and not any(_differs(pair, before) for pair in chosen):
                wrong = "every matrix is equal there, so nothing was aligned"
        except ImmunityError as error:
            return [*found, Problem("base", str(error))]
        if wrong:
            found.append(Problem("base", f"{self.base!r} is not what the model was aligned from: {wrong}"))
        return found

    def edit(self, model: LanguageModel, before: Stored) -> Mapping[str, float]:
        """Push every matrix; says how far, how much of D that is, and what of it survived rounding."""
        total = Applied()
        if not self.alpha:
            return total.summary()  # adding 0 would turn -0 into 0
        for pair in pairs(model.network, before, embeddings=self.embeddings):
            self._push(pair.weight.detach(), before[str(pair.stored)], total)
        _warn(total, next(model.network.parameters()).dtype)
        return total.summary()

    def streamed(self, aligned: str, folder: Path, dtype: torch.dtype | None = None) -> Mapping[str, float]:
        """The same from folder to folder: of either model, no more than one matrix is ever in memory.

        Args:
            aligned: A folder with a whole model.
            folder: Where the result goes, a plain model.
            dtype: Of the result; None is that of the aligned model.

        Raises:
            SettingsError: α is 0, or no base is given.
            ModelError: A folder is no whole model, or the two do not fit.
        """
        if not self.alpha or not self.base:
            raise SettingsError(
                f"alpha = {self.alpha}, base = {self.base!r}: say a positive alpha, and the base's folder"
            )
        source, before, total = Stored(aligned), Stored(self.base), Applied()
        left_out = set() if self.embeddings else _sizes(source.config())
        chosen = {n: place.shape for n, place in source.places.items() if len(place.shape) > 1}
        paired = {n: before.called((n,)) for n, shape in chosen.items() if shape[0] not in left_out}
        wrong = [n for n, there in paired.items() if there is None or before.places[there].shape != chosen[n]]
        if not wrong and all(torch.equal(source[n], before[str(there)]) for n, there in paired.items()):
            raise ModelError(f"{self.base!r} and {aligned!r} have the same matrices, so nothing was aligned")
        if wrong:
            raise ModelError(f"{self.base!r} is not what {aligned!r} was aligned from: {wrong[0]} does not fit there")

        def change(name: str, weight: Tensor) -> Tensor:
            if name in paired:
                self._push(weight, before[str(paired[name])], total)
            return weight

        with torch.no_grad():
            source.rewritten(folder, change, dtype)
        _warn(total, dtype or min((source.places[n].dtype for n in paired), key=lambda kind: kind.itemsize))
        return total.summary()

    def _push(self, weight: Tensor, before: Tensor, total: Applied) -> None:
        extrapolate(weight, before, self.alpha, self.rank, svd=self.svd, subtract=self.subtract, total=total)


def _differs(pair: Pair, before: Stored) -> bool:
    there = before[str(pair.stored)]
    return not torch.equal(pair.weight.detach().cpu(), there.to(pair.weight.dtype))


def _sizes(config: Mapping[str, Any]) -> set[int]:
    """Rows of matrices that are embeddings, or the head."""
    text = config.get("text_config", config)
    return {text[key] for key in ("vocab_size", "max_position_embeddings", "n_positions") if key in text}


def _warn(total: Applied, dtype: torch.dtype) -> None:
    if total.survived < SURVIVES:
        _LOG.warning(
            "of LoX's edit only a cosine of %.2f survives rounding to %s: open the model in float32 (--dtype float32) "
            "and it is saved so",
            total.survived,
            str(dtype).removeprefix("torch."),
        )
