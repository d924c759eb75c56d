"""Overlaps: what of the data that attacks and measures a defence was trained on, told by the hashes in its record.

The texts are not needed. Where a record has no hashes of shingles, as those of earlier releases, its corpora are made
or read again if their names say how and the prompts are the same; where that cannot be, nothing is said to be disjoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import add, or_
from pathlib import Path
from typing import Any, Final, NamedTuple

from immunity.bench.assault import held_out, whole
from immunity.bench.hardened import Hardened
from immunity.bench.prints import prompt_text, prompts_as_written
from immunity.data import catalogue, synthetic
from immunity.data.corpus import ROLES, Corpora, Corpus
from immunity.data.duplicates import Prints, prints, unpacked, words
from immunity.data.files import SUFFIXES
from immunity.errors import DataError, ImmunityError
from immunity.measure.suite import SYNTHETIC, Suite

Row = dict[str, Any]
"""``defence``, ``with`` (a data set), ``kind``, ``shared`` (None: not compared) and ``of``; ``why`` it was not, or not
all of it; ``note``; ``decides``, False if it is told and decides nothing."""

EXACT: Final = "exact prompt"
NGRAM: Final = "n-gram"
WRITTEN: Final = "prompt as written"
"""What old records allow: the same letters, so another case or space hides a prompt."""

_DECLINED: Final = frozenset({"alignment", "safe", "vulnerable"})
"""Roles in which a defence may learn to turn a question down."""
_LOST: Final = "the texts cannot be made or read again"
_PIECE: Final = re.compile(rf"{SYNTHETIC}(\w+)(?:/(\w+))?((?:\[\d*:\d*\])*)")
_CUT: Final = re.compile(r"\[(\d*):(\d*)\]")


class Asked(NamedTuple):
    """Prompts that attack or measure.

    Attributes:
        name: As a person should read it.
        corpus: The rows.
        answered: Only those count that the defence has trained on in a role in which they may be answered: it may learn
            to turn down what the attacker will ask.
    """

    name: str
    corpus: Corpus
    answered: bool

    @property
    def texts(self) -> dict[tuple[str, ...], str]:
        """The words of every prompt -> the prompt."""
        return {words(text): text for text in map(prompt_text, self.corpus)}


@dataclass(frozen=True)
class Trained:
    """A corpus that a defence was trained on.

    Attributes:
        row: What the record says of it.
        prints: Its hashes; None if they cannot be had.
        why: Why not.
    """

    row: Mapping[str, Any]
    prints: Prints | None
    why: str = ""

    @property
    def name(self) -> str:
        """As the record has it."""
        return str(self.row.get("name") or "data without a name")

    @property
    def declined(self) -> bool:
        """Whether it may teach to turn questions down."""
        return self.row.get("role") in _DECLINED


def asked(suite: Suite, data: Corpora, domain: str = "") -> list[Asked]:
    """What a suite measures, and the attacker's restricted rows.

    Args:
        suite: The suite.
        data: What the attacker has.
        domain: Whose rows they are, if there are several domains.
    """
    found = [Asked(f"measured: {corpus.name}", corpus, False) for corpus in held_out(suite)]
    if "harmful" in data:
        name = "the attacker's restricted rows" + (f" of {domain}" if domain else "")
        found.append(Asked(name, whole(data["harmful"]), True))
    return found


def trained(model: Hardened) -> list[Trained]:
    """What a model and those that it was made from were trained on, as far as there are records."""
    return [_trained(row) for one in model.lineage() for row in (one.record or {}).get("data", ())]


def rows(model: Hardened, sets: Sequence[Asked]) -> Iterator[Row]:
    """How many prompts of each set the defence was trained on, exactly and nearly; nothing if no record says."""
    known = trained(model)
    for one in sets if known else ():
        used = relevant(known, one)
        lost = [t for t in used if t.prints is None]
        why = not_compared([f"{t.name}: {t.why}" for t in lost])
        seen = reduce(or_, (t.prints for t in used if t.prints is not None), Prints())
        mine = one.texts
        same = sum(map(seen.same, mine))
        near = sum(seen.same(said) or seen.near(said) for said in mine)
        scaled = min(len(mine), same + math.ceil((near - same) / seen.part)) if near > same else same
        yield row(model, one, EXACT, same, len(mine), why=why)
        yield row(model, one, NGRAM, scaled, len(mine), why=why, note=_kept(seen))
        if any(isinstance(t.row.get("prompts"), list) for t in lost):
            yield _written(model, one, lost)


def row(
    model: Hardened, one: Asked, kind: str, shared: int, of: int, *, why: str = "", note: str = "", decides: bool = True
) -> Row:
    """One comparison; what was not compared with everything never shows a silent 0."""
    found: Row = {"defence": model.model, "with": one.name, "kind": kind, "shared": shared, "of": of}
    if why:
        found |= {"shared": shared or None, "why": why}
    return found | ({"note": note} if note else {}) | ({} if decides else {"decides": False})


def relevant(known: Sequence[Trained], one: Asked) -> list[Trained]:
    """What a set is compared with."""
    return [t for t in known if not (one.answered and t.declined)]


def not_compared(reasons: Sequence[str]) -> str:
    """Reasons in one line."""
    several = list(dict.fromkeys(reasons))
    return f"{several[0]}{f', and {len(several) - 1} more' if len(several) > 1 else ''}" if several else ""


def rebuilt(row: Mapping[str, Any]) -> Corpus | None:
    """The corpus of a record's row, made or read again from its name; None if there is none with the same prompts.

    Args:
        row: With "name", "role", and "prompts" or at least "fingerprint" to know it by.

    Raises:
        DataError: The row's hashes are damaged.
    """
    return next((corpus for corpus in _made(row) if _same(row, corpus)), None)


def _made(row: Mapping[str, Any]) -> Iterator[Corpus]:
    """What a name may stand for; nothing is fetched."""
    name = str(row.get("name"))
    pieces = [_PIECE.fullmatch(piece) for piece in re.split(rf"\+(?={SYNTHETIC})", name)]
    if None not in pieces:
        for role in dict.fromkeys((str(row.get("role")), *ROLES)):
            with suppress(DataError):  # no such rows in this role
                yield reduce(add, (_piece(piece, role) for piece in pieces if piece is not None))
    elif name.lower().endswith(SUFFIXES) and Path(name).is_file():
        with suppress(ImmunityError, OSError, ValueError):
            yield catalogue.load(name, "general", on_bad="skip")


def _piece(found: re.Match[str], role: str) -> Corpus:
    name, split, cuts = found.groups()
    roles = synthetic.NAMES.get(name, ())
    corpus = synthetic.corpus(name, role if role in roles or not roles else roles[0], split or "train")
    for first, last in _CUT.findall(cuts):
        chosen = corpus.examples[int(first or 0) : int(last) if last else None]
        corpus = Corpus(corpus.role, chosen, corpus.name, corpus.licence)
    return corpus


def _same(row: Mapping[str, Any], corpus: Corpus) -> bool:
    stored = row.get("prompts")
    if isinstance(stored, Mapping):
        return prints(map(prompt_text, corpus), most=0).exact == unpacked(stored).exact
    if isinstance(stored, list):
        return prompts_as_written(corpus) == stored
    return corpus.fingerprint == row.get("fingerprint")


def _trained(row: Mapping[str, Any]) -> Trained:
    stored = row.get("prompts")
    if isinstance(stored, Mapping):
        try:
            return Trained(row, unpacked(stored))
        except DataError as error:
            return Trained(row, None, str(error))
    corpus = rebuilt(row)
    if corpus is None:
        return Trained(row, None, f"the record has no hashes of words, and {_LOST}")
    return Trained(row, prints(map(prompt_text, corpus)))


def _written(model: Hardened, one: Asked, lost: Sequence[Trained]) -> Row:
    seen = {digest for t in lost for digest in t.row.get("prompts") or ()}
    mine = prompts_as_written(one.corpus)
    shared = sum(digest in seen for digest in mine)
    note = "by an old record: another case or space hides a prompt"
    return row(model, one, WRITTEN, shared, len(mine), note=note, decides=shared > 0)


def _kept(seen: Prints) -> str:
    if seen.part == 1.0:
        return ""
    return f"shingles of {seen.part:.0%} of the defence's prompts are kept; what they find is scaled up"
