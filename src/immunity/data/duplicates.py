"""Duplicates: whether a prompt is one of a set's but for case, signs, spaces or a word; told from hashes, not texts.

Two definitions, both of *words*: runs of letters and digits in Unicode's compatible form (NFKC), case folded, without
signs and invisible characters; an ideograph is a word, and so is a sign between two digits (2 + 2 is not 2 - 2).

* **Exact**: the same words in the same order.
* **n-gram**: at least 80 % of the prompt's shingles are those of *one* of the set's prompts, where one word may be left
  out of either. A shingle is five words running, and it may run over either end, so "starts with *how do I*" is one.
  Short prompts thus have shingles of fewer words, and every word is in five.

That it is one prompt matters: where every thing is asked about in every form, all shingles of a new question stand in
one prompt or another, though nobody put it. A word that is put in or left out hides no prompt. A word that is
*replaced* leaves a prompt of five words half of its shingles, one of sixteen 79 %: a known question about another thing
is no duplicate; a prompt of seventeen words or more may differ in a word and be one. What is not found: a prompt inside
a much longer one, several words more or less in a short one, other words for the same (for that see
:mod:`immunity.measure.likeness`).

Source:
    The share of 80 %, and a budget of words that match nothing: the contamination analysis of Llama 2 (arXiv
    2307.09288, appendix A.6), there of tokens in runs of more than ten, in all documents together. One prompt, its ends
    and shorter runs are ours: ten tokens are more than a short question has.
"""

from __future__ import annotations

import base64
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any, Final

from immunity.errors import DataError

ORDER: Final = 5
"""Words in a shingle."""
KNOWN: Final = 0.8
"""A prompt with at least this share of known shingles is a near-duplicate."""
LEAST: Final = 3
"""A word is left out only if so many others stay."""
MOST: Final = 1 << 15
"""Shingles that are kept of a set: 352 KB of text. Of a larger set, those of some of its prompts, drawn by hash."""
VERSION: Final = 2
"""Of what :func:`packed` writes; version 1 was a list of hashes of prompts as they were written."""

_IDEOGRAPHS: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD: Final = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+|(?<=\d)\s*[^\w\s]\s*(?=\d)")
_APOSTROPHE: Final = re.compile(r"(?<=\w)['\u2019](?=\w)")
_LARGEST: Final = 1 << 26
_EDGE: Final = ("",) * (ORDER - 1)


def words(text: str) -> tuple[str, ...]:
    """The words of a text (see the module); of a text without any, what is left of it as one word."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = unicodedata.normalize("NFKC", _APOSTROPHE.sub("", text).casefold())
    return tuple(word.strip() for word in _WORD.findall(text)) or ("".join(text.split()),)


def shingles(found: Sequence[str]) -> list[int]:
    """Hashes of 64 bits of every five words running, as many as there are words and four more."""
    whole = (*_EDGE, *found, *_EDGE)
    return [_hash(whole[i : i + ORDER]) for i in range(len(whole) - ORDER + 1)]


@dataclass(frozen=True)
class Prints:
    """What is kept of a set of prompts.

    Attributes:
        exact: A hash of every prompt's words.
        shingles: Of those hashes, all or some -> the prompt's shingles.
    """

    exact: frozenset[int] = frozenset()
    shingles: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def __or__(self, other: Prints) -> Prints:
        """Of the prompts of both."""
        return Prints(self.exact | other.exact, {**self.shingles, **other.shingles})

    @property
    def part(self) -> float:
        """The share of prompts whose shingles are kept."""
        return len(self.shingles) / len(self.exact) if self.exact else 1.0

    def same(self, found: Sequence[str]) -> bool:
        """Whether a prompt of these words is in the set."""
        return _hash(found) in self.exact

    def near(self, found: Sequence[str]) -> bool:
        """Whether a prompt of these words is in the set, or nearly, as far as shingles are kept."""
        return self.share(found) >= KNOWN

    def share(self, found: Sequence[str]) -> float:
        """The greatest share of a prompt's shingles that one prompt of the set has, as far as it matters.

        One word of either is left out if that makes it greater, and if it may become enough.
        """
        return self._index.share(found)

    @cached_property
    def _index(self) -> _Index:
        index = _Index()
        for one in self.shingles.values():
            index.add(one)
        return index


class _Index:
    """Prompts by their shingles."""

    def __init__(self) -> None:
        self._rows: list[frozenset[int]] = []
        self._with: dict[int, list[int]] = {}

    def add(self, grams: frozenset[int]) -> None:
        for one in grams:
            self._with.setdefault(one, []).append(len(self._rows))
        self._rows.append(grams)

    def share(self, found: Sequence[str]) -> float:
        """See :meth:`Prints.share`."""
        grams = frozenset(shingles(found))
        counts = Counter(row for one in grams for row in self._with.get(one, ()))
        best = max(counts.values(), default=0) / len(grams)
        least = KNOWN * (len(grams) - 1) - (ORDER - 1)  # a word less makes that many new shingles
        close = [self._rows[row] for row, n in counts.items() if n >= least]
        if best >= KNOWN or not close or len(found) < LEAST:
            return best
        if any(len(row) == len(grams) + 1 and len(grams - row) < ORDER for row in close):
            return 1.0  # without one of its words the other is this one
        for i in range(len(found) if len(found) > LEAST else 0):
            rest = frozenset(shingles([*found[:i], *found[i + 1 :]]))
            best = max(best, *(len(rest & row) / len(rest) for row in close))
        return best


def distinct(texts: Iterable[str]) -> list[str]:
    """Those that are no near-duplicate of one before them."""
    index = _Index()
    found = []
    for text in texts:
        said = words(text)
        if index.share(said) < KNOWN:
            found.append(text)
            index.add(frozenset(shingles(said)))
    return found


def prints(texts: Iterable[str], most: int = MOST) -> Prints:
    """Of a set of prompts.

    Args:
        texts: The prompts.
        most: Different shingles to keep, at most.
    """
    by_hash = {_hash(found): found for found in map(words, texts)}
    kept: dict[int, frozenset[int]] = {}
    known: set[int] = set()
    for one in sorted(by_hash):
        grams = frozenset(shingles(by_hash[one]))
        if len(known | grams) > most:
            break
        kept[one] = grams
        known |= grams
    return Prints(frozenset(by_hash), kept)


def packed(found: Prints) -> dict[str, Any]:
    """As plain data: every hash once, about eleven characters each, and which prompt has which shingles.

    "exact" are the prompts in order; the first of them have their shingles. Those are numbered as they come, and "rows"
    has the numbers of each prompt, written as differences, since most follow one another.
    """
    covered = sorted(found.shingles)
    numbers: dict[int, int] = {}
    steps: list[int] = []
    last = 0
    for one in covered:
        places = sorted(numbers.setdefault(gram, len(numbers)) for gram in sorted(found.shingles[one]))
        steps += [len(places), places[0] - last, *(b - a for a, b in pairwise(places))]
        last = places[-1]
    return {
        "version": VERSION,
        "words": ORDER,
        "prompts": len(found.exact),
        "covered": len(covered),
        "exact": _written(struct.pack(f">{len(found.exact)}Q", *covered, *sorted(found.exact - set(covered)))),
        "shingles": _written(struct.pack(f">{len(numbers)}Q", *numbers)),
        "rows": _written(zlib.compress(struct.pack(f">{len(steps)}i", *steps), 9)),
    }


def unpacked(row: Mapping[str, Any]) -> Prints:
    """What :func:`packed` wrote.

    Raises:
        DataError: It is damaged, or of another version.
    """
    if row.get("version") != VERSION or row.get("words") != ORDER:
        raise DataError(
            f"hashes of prompts of version {row.get('version')!r} with shingles of {row.get('words')!r} words; this "
            f"release reads version {VERSION} with {ORDER}"
        )
    try:
        exact, grams = (_numbers("Q", _read(row[key])) for key in ("exact", "shingles"))
        steps = _numbers("i", zlib.decompressobj().decompress(_read(row["rows"]), _LARGEST))
        rows: dict[int, frozenset[int]] = {}
        at = last = 0
        for one in exact[: int(row["covered"])]:
            places = list(accumulate(steps[at + 1 : at + 1 + steps[at]], initial=last))[1:]
            at, last = at + 1 + len(places), places[-1]
            rows[one] = frozenset(grams[place] for place in places)
        return Prints(frozenset(exact), rows)
    except (KeyError, IndexError, TypeError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"hashes of prompts are damaged ({error}): run what wrote the record again") from error


def _hash(found: Iterable[str]) -> int:
    return int.from_bytes(blake2b("\n".join(found).encode(errors="replace"), digest_size=8).digest(), "big")


def _written(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _read(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _numbers(kind: str, data: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(data) // struct.calcsize('>' + kind)}{kind}", data)
