"""Roles that follow from others: restricted rows that are held out, and the safe answer to each restricted prompt."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from operator import add
from typing import Any, Final

from immunity.data.corpus import Corpora, Corpus
from immunity.errors import DataError

HELD_OUT: Final = 0.2
"""Share of the restricted rows that is held out of the simulated attackers' (TAR's split, arXiv 2408.00761)."""


def partner(reads: Collection[str]) -> str:
    """The role whose prompts "safe" answers row for row: "heldout" where a method reads it, else "harmful"."""
    return "heldout" if "heldout" in reads else "harmful"


def dealt(reads: Collection[str], data: Corpora) -> Corpora:
    """The data of a method, and what follows from them: dealing twice changes nothing.

    * "heldout", where a method reads it and nobody gave it: the last fifth of "harmful", which keeps the others.
    * "safe" is put in the order of its partner's prompts (:func:`partner`).

    Args:
        reads: The roles that the method reads.
        data: Role -> corpora.

    Raises:
        DataError: A restricted prompt has no safe answer, or there are too few rows to hold any out.
    """
    if not {"heldout", "safe"} & set(reads):
        return data
    found: dict[str, Any] = dict(data)
    if "heldout" in reads and "heldout" not in found and "harmful" in found:
        found["harmful"], found["heldout"] = _parted(_one(found["harmful"]))
    beside = partner(reads)
    if "safe" in reads and {"safe", beside} <= set(found):
        found[beside] = _one(found[beside])
        found["safe"] = _matched(_one(found["safe"]), found[beside])
    return found


def _one(corpus: Corpus | tuple[Corpus, ...]) -> Corpus:
    return reduce(add, corpus) if isinstance(corpus, tuple) else corpus


def _parted(whole: Corpus) -> tuple[Corpus, Corpus]:
    kept = len(whole) - int(len(whole) * HELD_OUT)
    if kept == len(whole):
        raise DataError(
            f"{whole.name}: {len(whole)} rows are too few to hold a fifth of them out; give more, or --heldout"
        )
    rest = Corpus("heldout", whole.examples[kept:], f"{whole.name}[{kept}:]", whole.licence)
    return whole.take(kept), rest


def _matched(safe: Corpus, restricted: Corpus) -> Corpus:
    by_prompt = {(e.prompt, e.input): e for e in reversed(safe.examples)}
    missing = [e for e in restricted if (e.prompt, e.input) not in by_prompt]
    if missing:
        raise DataError(
            f"{safe.name}: {len(missing)} of the {len(restricted)} prompts of {restricted.name} have no safe answer "
            "there (the prompts must be the same, letter for letter)"
        )
    rows = tuple(by_prompt[e.prompt, e.input] for e in restricted)
    return safe if rows == safe.examples else Corpus("safe", rows, safe.name, safe.licence, safe.skipped)
