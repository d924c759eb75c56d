"""Curation: answers are rewritten until a model finds them unsurprising, as long as they stay good answers.

Ã = argmin PPL_θ(A')  over what a beam search finds from (Q, A),  subject to  q(A') ≥ τ q(A)  for each quality q
(CTRL, arXiv 2405.19358). Who writes, who is surprised and what is good are functions that are handed in; the questions
are never touched. Rows are searched a few at a time, and what was found is kept, so a killed search goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from immunity.data.corpus import Example
from immunity.quality import Quality

ROWS: Final = 8
"""Rows that are searched at a time, and kept together."""


class Draft(NamedTuple):
    """What is to be written: another answer to a row, sampled in this way."""

    row: Example
    temperature: float
    top_p: float


class Writer(Protocol):
    """Writes an answer for each draft, "" where it cannot; the same for the same drafts and state of the generator."""

    def __call__(self, drafts: Sequence[Draft], generator: torch.Generator) -> list[str]:
        """The new answers, in order."""


Oracle: TypeAlias = Callable[[Sequence[Example]], list[float]]
"""Rows -> the perplexity of each response; infinite where it cannot be had."""


class By(NamedTuple):
    """Who does what in a search.

    Attributes:
        write: Rewrites answers.
        oracle: Is surprised by them.
        qualities: What they must keep.
    """

    write: Writer
    oracle: Oracle
    qualities: Sequence[Quality]


@dataclass(frozen=True)
class Search:
    """How the beam search goes.

    Attributes:
        rounds: How often the beam is rewritten.
        beam: Answers that are kept from round to round.
        grid: (temperature, top-p) of each rewriting of each of them.
        tau: τ, the share of the first answer's quality that each quality must keep.
    """

    rounds: int
    beam: int
    grid: tuple[tuple[float, float], ...]
    tau: float


@dataclass(frozen=True)
class Candidate:
    """An answer.

    Attributes:
        text: The answer.
        perplexity: What the oracle says.
        quality: What each quality says.
    """

    text: str
    perplexity: float
    quality: tuple[float, ...]


@dataclass(frozen=True)
class Curated:
    """What became of a row.

    Attributes:
        before: Its own answer.
        after: The one with the least perplexity; the same if none is better.
        written: How many other answers there were, each counted once.
        judged: How many of them were unsurprising enough to be judged.
        rejected: How many of those were not good enough.
    """

    before: Candidate
    after: Candidate
    written: int
    judged: int
    rejected: int

    @property
    def distance(self) -> float:
        """The share of words that changed: 1 − twice the matching ones over all; 0 if nothing did."""
        a, b = self.before.text.split(), self.after.text.split()
        return 1.0 - SequenceMatcher(None, a, b, autojunk=False).ratio()


@dataclass
class _State:
    """Where the search of one row stands."""

    row: Example
    beam: list[Candidate]
    floors: tuple[float, ...]
    known: set[str] = field(default_factory=set)
    judged: int = 0
    rejected: int = 0

    def contends(self, perplexity: float, beam: int) -> bool:
        """Whether it would enter the beam, were it good enough; older answers win ties."""
        return math.isfinite(perplexity) and (len(self.beam) < beam or perplexity < self.beam[-1].perplexity)


def searched(
    rows: Sequence[Example],
    how: Search,
    by: By,
    generator: Callable[[int], torch.Generator],
) -> list[Curated]:
    """Beam search from each row's answer; each round, the ``beam`` least surprising of old and new good ones stay.

    An answer that would not enter the beam is not judged, which changes nothing but the cost.

    Args:
        rows: Questions, each with its answer.
        how: See :class:`Search`.
        by: See :class:`By`; with τ = 0 no quality is asked for.
        generator: Number of a round -> random numbers of its own.
    """
    by = by if how.tau > 0 else by._replace(qualities=())
    starts = [
        Candidate(row.response, perplexity, scores)
        for row, perplexity, scores in zip(rows, by.oracle(rows), _scores(rows, by.qualities), strict=True)
    ]
    states = [
        _State(row, [start], tuple(how.tau * score for score in start.quality), {row.response.strip()})
        for row, start in zip(rows, starts, strict=True)
    ]
    for turn in range(how.rounds):
        asked = [
            (state, Draft(replace(state.row, response=one.text), *place))
            for state in states
            for one in state.beam
            for place in how.grid
        ]
        texts = by.write([draft for _, draft in asked], generator(turn))
        _enter([(state, text) for (state, _), text in zip(asked, texts, strict=True)], how.beam, by)
    return [
        Curated(start, state.beam[0], len(state.known) - 1, state.judged, state.rejected)
        for start, state in zip(starts, states, strict=True)
    ]


def _enter(written: Sequence[tuple[_State, str]], beam: int, by: By) -> None:
    fresh = []
    for state, text in written:
        if text and text not in state.known:
            state.known.add(text)
            fresh.append((state, replace(state.row, response=text)))
    good: list[tuple[_State, Candidate]] = []
    for (state, row), perplexity in zip(fresh, by.oracle([row for _, row in fresh]), strict=True):
        if state.contends(perplexity, beam):
            state.judged += 1
            good.append((state, Candidate(row.response, perplexity, ())))
    for k, quality in enumerate(by.qualities):  # who has failed one is not asked about the next, which may be dearer
        scores = quality([replace(state.row, response=one.text) for state, one in good])
        passed = []
        for (state, one), score in zip(good, scores, strict=True):
            if score >= state.floors[k]:
                passed.append((state, replace(one, quality=(*one.quality, score))))
            else:
                state.rejected += 1
        good = passed
    for state, one in good:
        state.beam.append(one)
    for state in {id(state): state for state, _ in written}.values():
        state.beam.sort(key=lambda one: one.perplexity)
        del state.beam[beam:]


def _scores(rows: Sequence[Example], qualities: Sequence[Quality]) -> list[tuple[float, ...]]:
    columns = [quality(rows) for quality in qualities]
    return list(zip(*columns, strict=True)) if columns else [()] * len(rows)


def curate(
    rows: Sequence[Example],
    how: Search,
    by: By,
    *,
    seed: int,
    path: Path | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> list[Curated]:
    """:func:`searched`, :data:`ROWS` rows at a time.

    Args:
        rows: Questions, each with its answer.
        how: See :class:`Search`.
        by: See :class:`By`.
        seed: Of all random numbers; those of some rows do not depend on the others.
        path: A file of lines, one for each row that is done, from which a killed search goes on, and ends as if it had
            not been killed; it must be this search's own.
        tell: Told of (rows done, rows) from time to time.
    """
    done = _found(path, len(rows))
    if tell is not None:
        tell(len(done), len(rows))
    for start in range(len(done), len(rows), ROWS):
        own = range(start, min(start + ROWS, len(rows)))
        found = searched([rows[i] for i in own], how, by, _numbers(seed, start))
        done += found
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found))
        if tell is not None:
            tell(len(done), len(rows))
    return done


def _numbers(seed: int, start: int) -> Callable[[int], torch.Generator]:
    def numbers(turn: int) -> torch.Generator:
        drawn = np.random.SeedSequence([seed, start, turn]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(drawn >> np.uint64(1)))

    return numbers


def _found(path: Path | None, n: int) -> list[Curated]:
    """What was found before, whole groups of rows; a line that a kill left half is cut off, and its group with it."""
    if path is None:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [one for one in takewhile(bool, map(_read, lines)) if one]
    whole = n if len(found) == n else len(found) // ROWS * ROWS
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(line + "\n" for line in lines[:whole]), encoding="utf-8")
    beside.replace(path)
    return found[:whole]


def _read(line: str) -> Curated | None:
    try:
        row = json.loads(line)
        before, after = (
            Candidate(one["text"], one["perplexity"], tuple(one["quality"])) for one in (row["before"], row["after"])
        )
        return Curated(before, after, row["written"], row["judged"], row["rejected"])
    except (ValueError, TypeError, KeyError):
        return None
