"""A model as benchmarks ask it: how likely a continuation is, how likely a text, and what it answers.

Two ways to ask. *Chat*: what a benchmark writes is the user's turn of the template that the model is trained with, and
the continuation is the answer. *Raw*: the text as it is, which is how most published figures of base models were made.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from immunity.batch import IGNORE, Batch, Tokens
from immunity.data.chat import PlainTemplate, Template
from immunity.data.corpus import Example
from immunity.errors import ModelError, SettingsError
from immunity.generate import generate
from immunity.losses import causal_lm, logits, response_states
from immunity.measure.loss import check_finite
from immunity.models import LanguageModel
from immunity.quiet import quiet

_LOG = logging.getLogger(__name__)

_ROWS: Final = 256
"""Positions whose logits exist at once."""


class Likelihood(NamedTuple):
    """How a model sees a continuation.

    Attributes:
        log_prob: In nats, summed over its tokens.
        greedy: Whether it is what the model would have said.
    """

    log_prob: float
    greedy: bool


class _Ask(NamedTuple):
    """Ids of a context, which is not empty, and of what follows it."""

    context: tuple[int, ...]
    follows: tuple[int, ...]


@final
@dataclass(frozen=True)
class Reader:
    """Asks one model.

    Attributes:
        model: Its network's modes and gradients stay as they are; no random number is drawn.
        chat: In the model's template, or with the text as it is.
        batch_size: Rows at once. In float32 it changes results by rounding only.
        window: Tokens that the model reads at most; None: as many as it has positions. What is longer loses its
            beginning, as in lm-eval, and that is logged.

    Raises:
        SettingsError: ``batch_size`` is below 1 or ``window`` below 2.
        ModelError: The tokenizer has no end-of-sequence token, which raw text needs.
    """

    model: LanguageModel
    chat: bool = True
    batch_size: int = 16
    window: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.window is not None and self.window < 2):
            raise SettingsError(f"batch_size = {self.batch_size}, window = {self.window}: at least 1 row and 2 tokens")
        if self.model.tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {self.model.source!r} has no end-of-sequence token: set its eos_token")

    @property
    def longest(self) -> int:
        """Tokens that the model reads at once."""
        found = getattr(causal_lm(self.model.network).config.get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (found, self.window) if limit is not None]
        return min(limits) if limits else self.model.max_length

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """How likely each continuation is after its context; after an empty one, how likely the text is by itself.

        Continuations that differ in their last token only are read in one row, as "A", "B", "C" and "D" are.

        Raises:
            ModelError: A continuation has no token, or more than the model has positions.
            DivergedError: The model gives no number.
        """
        return self._read([self._ask(context, follows) for context, follows in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text, in nats: in windows side by side, each token predicted once.

        Raises:
            ModelError: A text has no token.
            DivergedError: The model gives no number.
        """
        asks, of = [], []
        for i, text in enumerate(texts):
            ids = self._ids(text, special=None)
            windows = _windows([self._start(), *ids], self.longest)
            if not windows:
                raise ModelError(f"text {i} has no token for the tokenizer of {self.model.source!r}")
            asks += windows
            of += [i] * len(windows)
        sums = [0.0] * len(texts)
        for i, found in zip(of, self._read(asks), strict=True):
            sums[i] += found.log_prob
        return sums

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int, until: Sequence[str] = ()) -> list[str]:
        """Greedy answers, each cut before the first of ``until`` in it; see :func:`immunity.generate.generate`.

        A prompt that leaves no room for ``max_new_tokens`` gets as many as there are, which is logged.

        Raises:
            ModelError: A prompt fills all positions.
            SettingsError: ``max_new_tokens`` is below 1.
        """
        model = replace(self.model, template=self._template())
        examples = [Example(prompt=prompt, response="") for prompt in prompts]
        rooms: dict[int, list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            length = len(model.template.prompt_ids(example))
            if length >= self.longest:
                raise ModelError(
                    f"prompt {i} has {length} tokens, and {self.model.source!r} reads {self.longest} with its answer; "
                    "show fewer examples (shots), or leave the task out"
                )
            rooms[min(max_new_tokens, self.longest - length)].append(i)
        if short := sum(len(rows) for room, rows in rooms.items() if room < max_new_tokens):
            told = (short, len(prompts), max_new_tokens)
            _LOG.warning("%d of %d answers have less room than the %d tokens asked for", *told)
        said = [""] * len(prompts)
        for room, rows in rooms.items():
            texts = generate(model, [examples[i] for i in rows], max_new_tokens=room, batch_size=self.batch_size)
            for i, text in zip(rows, texts, strict=True):
                said[i] = _until(text, until)
        return said

    def _template(self) -> Template:
        """What prompts are written in."""
        if self.chat:
            return self.model.template
        tokenizer, end = self.model.tokenizer, int(self.model.tokenizer.eos_token_id)
        return PlainTemplate(
            "raw", tokenizer, without_input="{prompt}", with_input="{prompt}", end=end, add_special_tokens=True
        )

    def _ask(self, context: str, follows: str) -> _Ask:
        if not context:
            ids = self._ids(follows, special=False)
            start = self._start()
            found = _Ask((start,), tuple(ids)) if ids[:1] != [start] else _Ask((start,), tuple(ids[1:]))
        elif self.chat:
            example, template = Example(prompt=context, response=follows), self._template()
            found = _Ask(tuple(template.prompt_ids(example)), tuple(template.answer_ids(example)[:-1]))
        else:
            text = context.rstrip()  # the space belongs to the word that follows
            before, whole = self._ids(text, special=None), self._ids(context + follows, special=None)
            found = _Ask(tuple(before), tuple(whole[len(before) :]))
        if not found.follows:
            raise ModelError(f"{follows!r} after {context[-30:]!r} has no token for {self.model.source!r}")
        if len(found.follows) >= self.longest:
            raise ModelError(f"{follows[:40]!r}… has {len(found.follows)} tokens; the model reads {self.longest}")
        return found

    def _read(self, asks: Sequence[_Ask]) -> list[Likelihood]:
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
        for i, ask in enumerate(asks):
            groups[ask.context, ask.follows[:-1]].append(i)
        rows = sorted(groups.values(), key=lambda row: len(asks[row[0]].context) + len(asks[row[0]].follows))
        if cut := sum(len(ask.context) + len(ask.follows) > self.longest for ask in asks):
            told = (cut, len(asks), self.longest)
            _LOG.warning("%d of %d texts are longer than %d tokens and lose their beginning", *told)
        found = [Likelihood(0.0, greedy=False)] * len(asks)
        with quiet(self.model.network):
            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                batch = Batch(tuple(self._row(asks[row[0]]) for row in chosen), "benchmark")
                states, targets, keep = response_states(self.model.network, batch)
                sizes = keep.sum(1).tolist()
                for row, h, ids in zip(chosen, torch.split(states, sizes), torch.split(targets, sizes), strict=True):
                    for i, value in zip(row, self._ends(h, ids, [asks[j].follows[-1] for j in row]), strict=True):
                        found[i] = value
        check_finite("log-likelihood", [one.log_prob for one in found])
        return found

    def _row(self, ask: _Ask) -> Tokens:
        """Ids and labels, cut on the left to what the model reads."""
        ids, labels = (*ask.context, *ask.follows), (*(IGNORE,) * len(ask.context), *ask.follows)
        return Tokens(ids[-self.longest :], labels[-self.longest :])

    def _ends(self, states: Tensor, ids: Tensor, lasts: Sequence[int]) -> list[Likelihood]:
        """Of one row, states [L, D] that predict ids [L], with each of ``lasts`` as its last token."""
        total, greedy = 0.0, True
        for part, wanted in zip(torch.split(states[:-1], _ROWS), torch.split(ids[:-1], _ROWS), strict=True):
            log_probs = logits(self.model.network, part).log_softmax(-1)
            total += float(log_probs.gather(1, wanted[:, None]).double().sum())
            greedy = greedy and bool((log_probs.argmax(-1) == wanted).all())
        final_ = logits(self.model.network, states[-1:]).log_softmax(-1)[0]
        best = int(final_.argmax())
        return [Likelihood(total + float(final_[i]), greedy and i == best) for i in lasts]

    def _ids(self, text: str, *, special: bool | None) -> list[int]:
        """Ids of plain text; ``special`` None leaves it to the tokenizer whether it begins with a BOS."""
        if special is None:
            return list(self.model.tokenizer(text)["input_ids"])
        return list(self.model.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _start(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.model.tokenizer.bos_token_id
        return int(self.model.tokenizer.eos_token_id if bos is None else bos)


def _windows(ids: Sequence[int], longest: int) -> list[_Ask]:
    """Windows over ids, whose first is given: each other one is predicted once; the last window sees what it can."""
    found = []
    for start in range(1, len(ids), longest - 1):
        end = min(start + longest - 1, len(ids))
        found.append(_Ask(tuple(ids[max(0, end - longest) : start]), tuple(ids[start:end])))
    return found


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text
