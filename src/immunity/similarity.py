"""Similarity of texts: how near each of some answers is to each of some prompts, by words or by the model itself."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from immunity.batch import pad
from immunity.data.overlap import words
from immunity.losses import causal_lm
from immunity.models import LanguageModel
from immunity.quiet import quiet

Cosines: TypeAlias = npt.NDArray[np.floating[Any]]
Nearness: TypeAlias = Callable[[int], Cosines]
"""Number of a prompt -> its cosine with each answer."""

ROWS: Final = 16
"""Texts in a forward pass of the model."""


def by_words(prompts: Sequence[str], answers: Sequence[str]) -> Nearness:
    """TF-IDF: cosines of word counts, each word weighted by ln((1 + N)/(1 + n)) + 1, n of all N texts having it.

    0 where no word is shared. Words are in lower case; there is no list of words to leave out.
    """
    counts = [words(text) for text in (*prompts, *answers)]
    texts_with = Counter(word for count in counts for word in count)
    rarity = {word: math.log((1 + len(counts)) / (1 + n)) + 1 for word, n in texts_with.items()}
    weighed = [{word: n * rarity[word] for word, n in count.items()} for count in counts]
    lengths = [math.sqrt(sum(w * w for w in text.values())) or 1.0 for text in weighed]

    listed: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for j, (text, length) in enumerate(zip(weighed[len(prompts) :], lengths[len(prompts) :], strict=True)):
        for word, weight in text.items():
            listed[word][0].append(j)
            listed[word][1].append(weight / length)
    postings = {word: (np.array(at), np.array(weights)) for word, (at, weights) in listed.items()}

    def near(i: int) -> Cosines:
        found = np.zeros(len(answers))
        for word, weight in weighed[i].items():
            if word in postings:
                at, weights = postings[word]
                found[at] += weight / lengths[i] * weights
        return found

    return near


def by_model(model: LanguageModel, prompts: Sequence[str], answers: Sequence[str]) -> Nearness:
    """Cosines of the model's last hidden states, averaged over a text's tokens, less the average over all texts.

    Without the latter all texts are alike to a language model, whose states share a direction. It is left as found.
    """
    states = torch.cat(list(_read(model, [*prompts, *answers])))
    units = functional.normalize(states - states.mean(0), dim=1)
    mine, theirs = units[: len(prompts)], units[len(prompts) :]
    return lambda i: (theirs @ mine[i]).numpy()


def _read(model: LanguageModel, texts: Sequence[str]) -> Iterator[Tensor]:
    device = next(model.network.parameters()).device
    for start in range(0, len(texts), ROWS):
        ids = [
            model.tokenizer(text, add_special_tokens=False)["input_ids"][: model.max_length] or [model.template.end_id]
            for text in texts[start : start + ROWS]
        ]
        batch = pad(ids, ids, device)
        with quiet(model.network):
            seen = causal_lm(model.network).base_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        mask = batch.attention_mask[..., None].float()
        yield ((seen.last_hidden_state.float() * mask).sum(1) / mask.sum(1)).cpu()
