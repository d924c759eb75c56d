"""Curation: the beam against the equation written out, and a search that is killed and goes on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from immunity.curation import ROWS, By, Draft, Search, curate, searched
from immunity.data.corpus import Example

GRID = tuple((t, p) for t in (0.2, 0.6, 1.0) for p in (0.5, 1.0))
QUESTIONS = [Example(f"Question {i}?", f"answer {i}", "an input" if i % 2 else "") for i in range(2 * ROWS + 3)]


def drawn(*parts: object) -> float:
    """A number in [0, 1) that looks random and depends on its arguments alone."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32


class Table:
    """A world without models: who writes, who is surprised and what is good are tables."""

    def __init__(self, seed: int, texts: int = 40) -> None:
        self.seed, self.texts = seed, texts
        self.calls: list[list[Draft]] = []
        self.judged: list[Example] = []

    def write(self, drafts, generator):
        self.calls.append(list(drafts))
        start = int(torch.randint(10**6, (1,), generator=generator))
        return [self.text(draft, start + i) for i, draft in enumerate(drafts)]

    def text(self, draft: Draft, i: int) -> str:
        n = int(drawn(self.seed, draft.row.prompt, draft.row.response, i) * self.texts)
        return "" if n == 0 else f"text {n}"

    def oracle(self, rows):
        found = [round(1 + 9 * drawn(self.seed, "ppl", row.prompt, row.response), 1) for row in rows]  # with ties
        return [math.inf if row.response == "text 7" else value for row, value in zip(rows, found, strict=True)]

    def readable(self, rows):
        self.judged += rows
        return [drawn(self.seed, "R", row.prompt, row.response) for row in rows]

    def helpful(self, rows):
        return [5 * drawn(self.seed, "H", row.prompt, row.response) for row in rows]

    @property
    def by(self) -> By:
        return By(self.write, self.oracle, (self.readable, self.helpful))


def numbers(turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(turn)


def brute(world: Table, rows: list[Example], how: Search) -> list[list[str]]:
    """The equation, slowly: every candidate is judged, then the k least surprising of all good ones are kept."""
    beams = [[row.response] for row in rows]
    for turn in range(how.rounds):
        drafts = [
            (i, Draft(replace(row, response=text), t, p))
            for i, row in enumerate(rows)
            for text in beams[i]
            for t, p in how.grid
        ]
        texts = world.write([draft for _, draft in drafts], numbers(turn))
        for i, row in enumerate(rows):
            mine = [text for (j, _), text in zip(drafts, texts, strict=True) if i == j and text]
            pool = list(dict.fromkeys([*beams[i], *mine]))
            at = {text: replace(row, response=text) for text in [*pool, row.response]}
            floor = [how.tau * quality([row])[0] for quality in (world.readable, world.helpful)]
            good = [
                text
                for text in pool
                if text in beams[i]
                or all(q([at[text]])[0] >= f for q, f in zip((world.readable, world.helpful), floor, strict=True))
            ]
            good = [text for text in good if math.isfinite(world.oracle([at[text]])[0])]
            beams[i] = sorted(good, key=lambda text: world.oracle([at[text]])[0])[: how.beam]
    return beams


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_the_beam_keeps_the_least_surprising_of_all_that_are_good(seed, beam, rounds, tau):
    how = Search(rounds, beam, GRID, tau)
    rows = QUESTIONS[:4]
    found = searched(rows, how, Table(seed).by, numbers)
    assert [one.after.text for one in found] == [texts[0] for texts in brute(Table(seed), rows, how)]
    for row, one in zip(rows, found, strict=True):
        assert one.before.text == row.response
        assert one.after.perplexity <= one.before.perplexity
        assert all(a >= tau * b for a, b in zip(one.after.quality, one.before.quality, strict=True))
        assert one.rejected <= one.judged <= one.written
        assert (one.distance == 0) == (one.after == one.before)


def test_each_member_of_the_beam_is_rewritten_at_every_place_of_the_grid():
    world, grid = Table(3), tuple((t, p) for t in (0.2, 0.4, 0.6, 0.8, 1.0) for p in (0.2, 0.4, 0.6, 0.8, 1.0))
    searched(QUESTIONS[:1], Search(5, 3, grid, 0.0), world.by, numbers)
    assert [len(call) for call in world.calls] == [25, 75, 75, 75, 75], "325 answers, as in the paper"
    for call in world.calls:
        for text in {draft.row.response for draft in call}:
            places = [draft[1:] for draft in call if draft.row.response == text]
            assert sorted(places) == sorted(grid)
    assert {(draft.row.prompt, draft.row.input) for call in world.calls for draft in call} == {
        (QUESTIONS[0].prompt, QUESTIONS[0].input)
    }, "questions are never touched"


def test_the_best_never_gets_worse_with_another_round():
    for seed in range(20):
        best = [
            [one.after.perplexity for one in searched(QUESTIONS[:3], Search(n, 2, GRID, 0.5), Table(seed).by, numbers)]
            for n in range(5)
        ]
        for earlier, later in pairwise(best):
            assert all(b <= a for a, b in zip(earlier, later, strict=True))


def test_an_answer_stays_if_nothing_is_good_enough_or_nothing_is_written():
    world = Table(1)
    bad = By(world.write, world.oracle, (lambda rows: [1.0 if row in QUESTIONS else 0.0 for row in rows],))
    for by in (bad, By(lambda drafts, _: [""] * len(drafts), world.oracle, ())):
        for row, one in zip(QUESTIONS, searched(QUESTIONS, Search(2, 3, GRID, 0.9), by, numbers), strict=True):
            assert one.after == one.before
            assert one.after.text == row.response
            assert one.rejected == one.judged


def test_who_cannot_enter_the_beam_is_not_judged():
    world = Table(5)
    found = searched(QUESTIONS[:4], Search(4, 1, GRID, 0.9), world.by, numbers)
    assert sum(one.judged for one in found) == len(world.judged) - 4
    assert sum(one.judged for one in found) < sum(one.written for one in found) / 2


def test_without_a_floor_nobody_is_asked():
    world = Table(5)
    found = searched(QUESTIONS[:2], Search(1, 2, GRID, 0.0), world.by, numbers)
    assert not world.judged
    assert all(one.after.quality == () for one in found)


HOW = Search(2, 2, GRID, 0.5)


class KilledError(BaseException):
    """As a kill: nobody catches it."""


def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_been(tmp_path):
    whole = curate(QUESTIONS, HOW, Table(9).by, seed=4)
    world, path, told = Table(9), tmp_path / "curated" / "rows.jsonl", []

    def dying(drafts, generator):
        if len(world.calls) == 2 * HOW.rounds - 1:  # in the last round of the second group
            raise KilledError
        return world.write(drafts, generator)

    with pytest.raises(KilledError):
        curate(QUESTIONS, HOW, world.by._replace(write=dying), seed=4, path=path)
    assert len(path.read_text().splitlines()) == ROWS
    again = Table(9)
    assert curate(QUESTIONS, HOW, again.by, seed=4, path=path, tell=lambda *now: told.append(now)) == whole
    asked = {draft.row.prompt for call in again.calls for draft in call}
    assert asked == {row.prompt for row in QUESTIONS[ROWS:]}, "what was done is not done again"
    assert told == [(ROWS, len(QUESTIONS)), (2 * ROWS, len(QUESTIONS)), (len(QUESTIONS), len(QUESTIONS))]
    third = Table(9)
    assert curate(QUESTIONS, HOW, third.by, seed=4, path=path) == whole
    assert not third.calls


@pytest.mark.parametrize("cut", [1, 40, 700, 2000])
def test_half_a_line_is_cut_off_with_its_group(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    whole = curate(QUESTIONS, HOW, Table(9).by, seed=4, path=path)
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    assert curate(QUESTIONS, HOW, Table(9).by, seed=4, path=path) == whole
    assert path.read_bytes() == text


def test_groups_draw_numbers_of_their_own():
    one, other = (curate(QUESTIONS, HOW, Table(9).by, seed=seed) for seed in (4, 5))
    assert one != other
    later = Table(9)
    rest = searched(QUESTIONS[ROWS : 2 * ROWS], HOW, later.by, numbers)
    assert rest != one[ROWS : 2 * ROWS]
