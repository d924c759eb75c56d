"""How much of what attacks and measures a defence was trained on, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from immunity.metrics.stats import finite
from immunity.report.show import NOTHING

Row = Mapping[str, Any]

TITLE: Final = "What of the attacks and the tests is in the defence's data too"
_EXACT: Final = "exact prompt"


class Overlap(NamedTuple):
    """One comparison of a data set with the defence's."""

    what: str
    defence: str
    kind: str
    shared: str
    share: str
    bad: bool
    note: str


def overlaps(audit: Row, generalisation: Row) -> list[Overlap]:
    """What the battery compared for every model, and what the condition compared besides for the hardened one."""
    first = _rows(audit.get("overlaps") or audit.get("overlap"))
    known = {_key(row) for row in first}
    return [_overlap(row) for row in (*first, *(row for row in _compared(generalisation) if _key(row) not in known))]


def summed(generalisation: Row) -> Iterator[str]:
    """One line for each way of comparing: all sets together, and how far it is to be believed."""
    by_kind: dict[str, list[Row]] = {}
    for row in _compared(generalisation):
        by_kind.setdefault(_key(row)[1], []).append(row)
    for kind, rows in by_kind.items():
        told = [row for row in rows if finite(row.get("shared")) is not None]
        counts = [sum(finite(row.get(key)) or 0.0 for row in told) for key in ("shared", "of")]
        parts = [f"{counts[0]:,.0f} of {counts[1]:,.0f}"] if told else []
        parts += [f"{len(rows) - len(told)} of {len(rows)} sets not compared"] if len(told) < len(rows) else []
        yield f"by {kind}: {'; '.join([*parts, *dict.fromkeys(note for row in rows if (note := _note(row)))])}"


def _rows(given: object) -> list[Row]:
    rows = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    return [row for row in rows if isinstance(row, Mapping)]


def _compared(generalisation: Row) -> list[Row]:
    return _rows((generalisation.get("details") or {}).get("duplicates"))


def _key(row: Row) -> tuple[str, str]:
    return str(row.get("with") or "data"), str(row.get("kind") or _EXACT)


def _note(row: Row) -> str:
    return "; ".join(str(row[key]) for key in ("why", "note") if row.get(key))


def _overlap(row: Row) -> Overlap:
    (what, kind), shared, of = _key(row), finite(row.get("shared")), finite(row.get("of")) or 0.0
    known = shared is not None
    return Overlap(
        what=what,
        defence=str(row.get("defence") or ""),
        kind=kind,
        shared=f"{shared:,.0f} of {of:,.0f}" if known else "not compared",
        share=f"{shared / of:.1%}" if shared is not None and of else NOTHING,
        bad=not known or bool(shared) or not row.get("decides", True),
        note=_note(row),
    )
