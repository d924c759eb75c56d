"""Likeness: does a model read two prompts as nearly the same? A threshold that is calibrated, or decides nothing.

A prompt is the mean of its tokens' hidden states after the middle block, less the mean over the defence's prompts. Two
prompts are as alike as the cosine of their vectors. The threshold is a high quantile of how alike each of the
defence's prompts is to the nearest *other* one, so a prompt above it is nearer to the defence's data than (nearly) all
of those are to one another. Whether it then finds duplicates is tried, too: on the defence's own prompts with a word
put in. Where prompts are many fillings of few forms it finds none of those, as a name more or less moves the mean less
than a word does. So the threshold counts as calibrated only where most of them are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from immunity.errors import DataError
from immunity.hidden import reading, sites
from immunity.losses import causal_lm
from immunity.models import LanguageModel
from immunity.quiet import quiet

QUANTILE: Final = 0.999
"""Of the likeness to the nearest other prompt. Of fewer than a thousand prompts that is the greatest."""
LEAST: Final = 200
"""Fewer distinct prompts calibrate nothing: one in so many new ones would be above the greatest by chance."""
FOUND: Final = 0.5
"""The threshold is calibrated if it finds at least this share of the duplicates that are made to try it."""
MADE: Final = 128
"""So many duplicates are made."""
PUT_IN: Final = "please"
"""The word that is put into the middle of them."""
_ROWS: Final = 512

Embed = Callable[[Sequence[str]], Tensor]
"""Texts -> vectors [n, D]."""


@dataclass(frozen=True)
class Likeness:
    """Prompts, and how alike another one must be to count as a duplicate.

    Attributes:
        vectors: Of the prompts, of length 1, [n, D].
        centre: What is subtracted, [D].
        threshold: The cosine above which a prompt is a duplicate.
        found: Share of made duplicates that are above it.
        made: How many were made.
    """

    vectors: Tensor
    centre: Tensor
    threshold: float
    found: float
    made: int

    @property
    def calibrated(self) -> bool:
        """Whether there were prompts enough, and it finds duplicates."""
        return len(self.vectors) >= LEAST and self.found >= FOUND

    def nearest(self, vectors: Tensor, among: Sequence[int] | None = None) -> list[float]:
        """The cosine to the nearest prompt.

        Args:
            vectors: Of other prompts, [m, D].
            among: Which prompts to look at; all by default.
        """
        known = self.vectors if among is None else self.vectors[list(among)]
        if not len(known):
            return [-1.0] * len(vectors)
        mine = normalize(vectors - self.centre, dim=1)
        return [float(v) for part in torch.split(mine, _ROWS) for v in (part @ known.T).max(1).values.tolist()]


def likeness(embed: Embed, texts: Sequence[str]) -> Likeness:
    """Calibrate on the prompts of a defence.

    Args:
        embed: Of texts.
        texts: Distinct prompts: a duplicate among them would raise the threshold.

    Raises:
        DataError: There are fewer than two.
    """
    if len(texts) < 2:
        raise DataError(f"{len(texts)} distinct prompts: it takes two to say how alike they are")
    raw = embed(texts)
    centre = raw.mean(0)
    vectors = normalize(raw - centre, dim=1)
    nearest = _nearest_other(vectors)
    threshold = float(torch.quantile(nearest, QUANTILE, interpolation="higher"))
    step = max(1, len(texts) // MADE)
    made = [_with_a_word(text) for text in texts[::step][:MADE]]
    found = Likeness(vectors, centre, threshold, 0.0, len(made))
    above = sum(value > threshold for value in found.nearest(embed(made)))
    return Likeness(vectors, centre, threshold, above / len(made), len(made))


def embedded(model: LanguageModel, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
    """The mean hidden state of each text after the middle block, without a template: [n, D], float32, on the CPU.

    What is beyond the model's length is not read.

    Raises:
        ModelError: The model's blocks cannot be found.
    """
    rows = [_ids(model, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    (place,) = sites(model.network, "output", [0.5])
    found: dict[int, Tensor] = {}
    with quiet(model.network), reading(model.network, (place,)) as seen:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(rows[chosen[-1]])
            ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen], device=model.device)
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen]).to(ids)
            causal_lm(model.network).base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            states, keep = seen[place].float(), mask[..., None]  # [B, T, D], [B, T, 1]
            means = ((states * keep).sum(1) / keep.sum(1)).cpu()
            found.update(zip(chosen, means, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def _ids(model: LanguageModel, text: str) -> list[int]:
    ids: list[int] = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: model.max_length] or [0]


def _nearest_other(vectors: Tensor) -> Tensor:
    """The cosine of each row to the nearest other one, [n]."""
    found = []
    for start in range(0, len(vectors), _ROWS):
        alike = vectors[start : start + _ROWS] @ vectors.T  # [B, n]
        alike[torch.arange(len(alike)), start + torch.arange(len(alike))] = -1.0
        found.append(alike.max(1).values)
    return torch.cat(found)


def _with_a_word(text: str) -> str:
    said = text.split()
    return " ".join([*said[: len(said) // 2], PUT_IN, *said[len(said) // 2 :]])
