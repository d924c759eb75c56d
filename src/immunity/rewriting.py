"""Rewriting: another answer to a question, by a language model; and how surprising an answer is to one.

What a curation (:mod:`immunity.curation`) asks of models: who writes, and who is surprised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from immunity.batch import Batch, Tokens
from immunity.curation import Draft
from immunity.data.corpus import Example
from immunity.errors import ModelError, SettingsError
from immunity.generate import sample
from immunity.losses import nll
from immunity.models import LanguageModel
from immunity.quality import BATCH, positions, shown
from immunity.quiet import quiet

ASKS: Final = {
    "perspective": "Answer the question from another point of view than the answer below. Write only the new answer.",
    "clearer": "Rewrite the answer below so that it is clearer and more helpful. Write only the new answer.",
    "question": "",
}
"""What a writer is told before it is shown a row; "": it is shown the question alone, as if it had no answer yet."""
_LEAD: Final = re.compile(
    r"\A[^\n]*\b(?:answer|response|version|rewrit\w*|revis\w*|rephrase\w*)\b[^\n]*:[ \t]*\n+", re.IGNORECASE
)
"""A first line that speaks of the answer instead of giving it, as chat models like to begin."""


def asked(row: Example, ask: str) -> Example:
    """The prompt from which a writer goes."""
    return Example(f"{ASKS[ask]}\n\n{shown(row)}", "") if ASKS[ask] else replace(row, response="")


@dataclass(frozen=True)
class Local:
    """A writer that is a causal language model.

    Attributes:
        model: Who writes; left as found.
        ask: What it is told: a key of :data:`ASKS`.
        tokens: Longest answer; less where the model has no room for it beside a prompt.

    Raises:
        SettingsError: There is no such thing to be told.
    """

    model: LanguageModel
    ask: str
    tokens: int

    def __post_init__(self) -> None:
        if self.ask not in ASKS:
            raise SettingsError(f"ask = {self.ask!r}: one of {', '.join(ASKS)}")

    def __call__(self, drafts: Sequence[Draft], generator: torch.Generator) -> list[str]:
        """See :class:`Writer`."""
        fit = [i for i, draft in enumerate(drafts) if self.fits(draft.row)]
        texts = [""] * len(drafts)
        if fit:
            prompts = [asked(drafts[i].row, self.ask) for i in fit]
            room = min(self._room(drafts[i].row) for i in fit)
            answers = sample(
                self.model,
                prompts,
                n=1,
                max_new_tokens=min(self.tokens, room),
                temperature=[drafts[i].temperature for i in fit],
                top_p=[drafts[i].top_p for i in fit],
                generator=generator,
            )
            for i, (answer,) in zip(fit, answers, strict=True):
                texts[i] = _LEAD.sub("", answer.text).strip()
        return texts

    def fits(self, row: Example) -> bool:
        """Whether there is room for an answer as long as the one that is rewritten."""
        return self._room(row) >= min(self.tokens, len(self.model.template.answer_ids(row)))

    def _room(self, row: Example) -> int:
        most = positions(self.model)
        longest = self.model.max_length  # what is longer is cut in training
        if most is None:
            return longest
        return min(longest, most - len(self.model.template.prompt_ids(asked(row, self.ask))))


def perplexities(model: LanguageModel, rows: Sequence[Example]) -> list[float]:
    """The exponential of the loss on each response after its question, as it is trained on: with its end, and cut.

    Infinite where the tokenizer cannot write the response, or its prompt leaves no room for it.
    """
    tokens = {i: found for i, row in enumerate(rows) if (found := _encoded(model, row)) is not None}
    order = sorted(tokens, key=lambda i: len(tokens[i].ids))
    values = [math.inf] * len(rows)
    with quiet(model.network):
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            losses = nll(model.network, Batch(tuple(tokens[i] for i in chosen)))
            for i, value in zip(chosen, losses.double().exp().tolist(), strict=True):
                values[i] = value if math.isfinite(value) else math.inf
    return values


def _encoded(model: LanguageModel, row: Example) -> Tokens | None:
    try:
        return model.template.encode(row, model.max_length).tokens
    except ModelError:
        return None
