"""Who judged an audit, and how far two judges agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from immunity.metrics.stats import finite, mean
from immunity.report.show import decimal

Row = Mapping[str, Any]

KINDS: Final = {
    "rule": "a rule",
    "model": "a model, on the machine of whoever ran it",
    "endpoint": "a chat model; prompts and answers were sent to it",
}
"""What judges, in words."""


class Judge(NamedTuple):
    """A judge: its name, what it goes by, and whose it is."""

    name: str
    role: str
    says: str
    kind: str
    scale: str
    source: str
    settings: str


class Judges(NamedTuple):
    """How far two judges agree about the answers of one model."""

    names: str
    model: str
    mean: str
    least: str
    n: int
    more: str


def judged(found: Row) -> Iterator[Judge]:
    """Who judged; older results do not say."""
    for row in found.get("judges") or ():
        if isinstance(row, Mapping) and row.get("judge"):
            said = {name: str(row.get(name) or "") for name in ("role", "says", "scale", "source", "settings")}
            kind = str(row.get("kind") or "")
            yield Judge(name=str(row["judge"]), kind=KINDS.get(kind, kind), **said)


def agreement(found: Row, result: Row) -> list[Judges]:
    """Agreement by pair of judges and model; of several attacks the mean, and the least."""
    groups: dict[tuple[str, str], list[Row]] = {}
    told = found.get("agreement") or found.get("judges") or ()
    pairs = [row for row in told if isinstance(row, Mapping) and "judge" not in row]
    for row in pairs or (result.get("battery") or {}).get("judges") or ():
        if isinstance(row, Mapping):
            names = " and ".join(map(str, row.get("judges") or ())) or "two judges"
            groups.setdefault((names, str(row.get("defence") or "")), []).append(row)
    made = []
    for (names, model), rows in groups.items():
        known = [(value, row) for row in rows if (value := finite(row.get("agreement", row.get("raw")))) is not None]
        if not known:
            continue
        least, where = min(known, key=lambda pair: pair[0])
        lowest = f"{decimal(least)} under {where['attack']}" if where.get("attack") else decimal(least)
        average = decimal(mean([value for value, _ in known]))
        made.append(Judges(names, model, average, lowest, len(known), _chance(rows)))
    return made


def _chance(rows: Sequence[Row]) -> str:
    """What is left of agreement without chance, and how many answers had no score."""
    said = []
    for key, sign in (("kappa", "κ"), ("alpha", "α")):
        known = [value for row in rows if (value := finite(row.get(key))) is not None]
        said += [f"{sign} {decimal(min(known))}{' at least' if len(known) > 1 else ''}"] if known else []
    unscored = [row["unscored"] for row in rows if row.get("unscored")]
    total = sum(sum(one) if isinstance(one, Sequence) else int(one) for one in unscored)
    return ", ".join([*said, *([f"{total} unscored"] if total else [])])
