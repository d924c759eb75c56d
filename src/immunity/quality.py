"""Quality of an answer, without looking anything up: does it read like sentences, does it help?

CTRL (arXiv 2405.19358) keeps a rewritten answer only if both numbers stay near those of the answer that it replaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias, final

import torch

from immunity.batch import IGNORE, Batch, Tokens
from immunity.data.corpus import Example
from immunity.data.refusal import is_refusal
from immunity.errors import ModelError
from immunity.losses import causal_lm, logits, response_states
from immunity.models import LanguageModel
from immunity.quiet import quiet

Quality: TypeAlias = Callable[[Sequence[Example]], list[float]]
"""Rows -> how good the response of each is; more is better, and never below 0."""

BATCH: Final = 32
"""Rows in a forward pass."""

_CLOSED: Final = {
    "D": "a an the this that these those each every some any no all both either neither another such",
    "P": "i you he she it we they me him her us them mine yours ours theirs myself yourself itself themselves "
    "who whom whose which what someone anyone everyone something anything everything nothing one",
    "G": "my your his its our their",
    "I": "of in on at by for with about against between into through during before after above below to from up "
    "down out off over under near until since within without upon toward towards among across behind beyond",
    "C": "and or but nor so yet because although though while if unless whereas than as whether",
    "V": "be am is are was were been being have has had having do does did done can could will would shall should "
    "may might must go goes went make makes made take takes took get gets got say says said give gives gave",
    "R": "not never always often very too also just only then there here now again still even when where why how "
    "quite rather almost soon today more most less least",
}
"""Part of speech -> its words, as far as they can be listed: determiners, pronouns, possessives, prepositions,
conjunctions, verbs, adverbs."""
_WORDS: Final = {word: tag for tag, words in _CLOSED.items() for word in words.split()}
_ENDINGS: Final = (
    ("R", ("ly",)),
    ("V", ("ing", "ed", "ize", "ise", "ify")),
    ("A", ("ous", "able", "ible", "ive", "ic", "al", "less", "ish", "est")),
)
_TOKEN: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+(?:[.,]\d+)*|[^\w\s]|_")
_SENTENCE: Final = re.compile(r"[^.!?\n]+[.!?]*")


def tags(sentence: str) -> str:
    """A letter for each word, number or sign: its part of speech by lists and endings, a noun where neither tells.

    English only, and coarse: it tells the shape of a sentence, not what is in it.
    """
    return "".join(_tag(token) for token in _TOKEN.findall(sentence.lower()))


def _tag(token: str) -> str:
    if not token[0].isalpha():
        return "M" if token[0].isdigit() else token if token in ".,?!:;" else "S"
    if token in _WORDS:
        return _WORDS[token]
    return next((tag for tag, ends in _ENDINGS if len(token) > 4 and token.endswith(ends)), "N")


def common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence: a row of the table at once, as the bits of a number (Hyyrö 2004)."""
    where: dict[str, int] = {}
    for i, sign in enumerate(a):
        where[sign] = where.get(sign, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for sign in b:
        met = row & where.get(sign, 0)
        row = ((row + met) | (row - met)) & full
    return len(a) - row.bit_count()


@final
class Readability:
    """How much a text's sentences are built like those of other texts: 0 to 1.

    For each sentence the largest |LCS(s, t)| / max(|s|, |t|) over known sentences t, both as :func:`tags`; the mean
    over the text's sentences. A text without a sentence scores 0.

    Args:
        texts: Where known sentences come from.
        most: Shapes of sentences that are kept, the first ones.
    """

    def __init__(self, texts: Iterable[str], *, most: int = 1000) -> None:
        shapes = dict.fromkeys(shape for text in texts for shape in _shapes(text))
        self._known = list(shapes)[:most]
        self._seen: dict[str, float] = {}

    def __call__(self, rows: Sequence[Example]) -> list[float]:
        """The readability of each response."""
        return [self.of(row.response) for row in rows]

    def of(self, text: str) -> float:
        """The readability of a text."""
        found = [self._nearest(shape) for shape in _shapes(text)]
        return sum(found) / len(found) if found else 0.0

    def _nearest(self, shape: str) -> float:
        if shape not in self._seen:
            best = 0.0
            for known in self._known:
                short, long = sorted((len(shape), len(known)))
                if short / long > best:  # it cannot be nearer than their lengths are
                    best = max(best, common_subsequence(shape, known) / long)
            self._seen[shape] = best
        return self._seen[shape]


def _shapes(text: str) -> list[str]:
    return [shape for sentence in _SENTENCE.findall(text) if (shape := tags(sentence))]


RUBRICS: Final = (
    "Does it answer the question that was asked?",
    "Is what it says right?",
    "Does it say all that is needed?",
    "Is it easy to understand?",
)
"""What an answer is rated for."""
RATINGS: Final = 6
"""0 to 5."""


@final
class Helpfulness:
    """What a model thinks of an answer: the mean over :data:`RUBRICS` of the rating that it expects itself to give.

    E[k] = Σ_k k p(k) / Σ_k p(k) over the ratings k = 0 … 5, read off the next token: nothing is sampled. An answer that
    declines scores 0, and so does one that is too long to be judged.

    Args:
        model: Who judges.

    Raises:
        ModelError: Its tokenizer does not begin the six ratings with six tokens.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        said = [model.template.answer_ids(Example("?", str(k)))[:-1] for k in range(RATINGS)]
        same = next((i for i, column in enumerate(zip(*said, strict=False)) if len(set(column)) > 1), None)
        if same is None or len({ids[same] for ids in said}) < RATINGS:
            raise ModelError(
                f"{model.source!r} cannot rate answers: its tokenizer has no token for each of the digits 0 to 5; have "
                "another model write and judge them (writer = …), or keep all candidates (tau = 0)"
            )
        self._begin, self._ratings = said[0][:same], [ids[same] for ids in said]

    def __call__(self, rows: Sequence[Example]) -> list[float]:
        """What each response is worth, 0 to 5."""
        tokens = [self._tokens(row, rubric) for row in rows for rubric in RUBRICS]
        most = self._positions
        fit = [i for i, one in enumerate(tokens) if most is None or len(one.ids) <= most]
        rated = dict.fromkeys(range(len(tokens)), 0.0)
        with quiet(self._model.network):
            for start in range(0, len(fit), BATCH):
                chosen = fit[start : start + BATCH]
                rated |= zip(chosen, self._rate([tokens[i] for i in chosen]), strict=True)
        n = len(RUBRICS)
        found = [sum(rated[i * n + k] for k in range(n)) / n for i in range(len(rows))]
        return [0.0 if is_refusal(row.response) else value for row, value in zip(rows, found, strict=True)]

    def fits(self, row: Example) -> bool:
        """Whether the model can read a row and what is asked about it."""
        most = self._positions
        return most is None or max(len(self._tokens(row, rubric).ids) for rubric in RUBRICS) <= most

    @property
    def _positions(self) -> int | None:
        return positions(self._model)

    def _tokens(self, row: Example, rubric: str) -> Tokens:
        asked = f"{rubric} Say a number from 0 (not at all) to 5 (fully).\n\n{shown(row)}"
        ids = (*self._model.template.prompt_ids(Example(asked, "")), *self._begin, self._ratings[0])
        return Tokens(ids, (*(IGNORE,) * (len(ids) - 1), ids[-1]))

    def _rate(self, rows: Sequence[Tokens]) -> list[float]:
        network = self._model.network
        states, _, _ = response_states(network, Batch(tuple(rows)))
        likely = logits(network, states)[:, self._ratings].double().softmax(-1)  # [B, 6]
        return [float(value) for value in likely @ torch.arange(RATINGS, dtype=torch.float64, device=likely.device)]


def shown(row: Example) -> str:
    """A row as a text that can be asked about."""
    question = f"{row.prompt}\n\n{row.input}" if row.input else row.prompt
    return f"Question: {question}\n\nAnswer: {row.response}"


def positions(model: LanguageModel) -> int | None:
    """How many tokens a model can read at once; None if it does not say."""
    found: int | None = getattr(causal_lm(model.network).config.get_text_config(), "max_position_embeddings", None)
    return found
