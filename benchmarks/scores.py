"""The scores behind a grid's tables, a line for each hardened model: small enough to be published beside the tables.

From them anyone can draw the intervals anew or compare two defences prompt by prompt, and a study goes on from them on
another machine. A score is the mean over attack seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Curve = Mapping[str, Any]
Scores = Mapping[str, list[float]]
"""Column's key -> one score a prompt."""
HERE = Path(__file__).parent


class Column(NamedTuple):
    """What is shown of an attack.

    Attributes:
        attack: Its id.
        metric: With one score a prompt.
        step: Where; None is the end, and 0 before any attack.
        head: Of the column.
    """

    attack: str
    metric: str
    step: int | None
    head: str = ""

    @property
    def key(self) -> str:
        """What tells it from other columns; heads differ from table to table."""
        return f"{self.attack} {self.metric} {'end' if self.step is None else self.step}"


def columns(study: Mapping[str, Any]) -> list[Column]:
    """Whatever a study shows or counts, each once."""
    asked = [*study["tables"], *study["front"].values(), *study.get("goal", ())]
    found = [Column(**column) for one in asked for column in one["columns"]]
    return list({column.key: column for column in found}.values())


def scored(parts: Iterable[Mapping[str, Any]], wanted: Iterable[Column]) -> dict[str, list[float]]:
    """The scores that the results of all parts of a battery have; columns that nobody measured are left out."""
    curves = [curve for result in parts for curve in result["curves"] if not curve["fresh"]]
    found = {}
    for column in wanted:
        rows = [one for curve in curves if curve["attack"] == column.attack and (one := _at(curve, column)) is not None]
        if rows:
            found[column.key] = [round(sum(values) / len(values), 4) for values in zip(*rows, strict=True)]
    return found


def digest(study: Mapping[str, Any], defence: Mapping[str, Any]) -> str:
    """Of all that a defence's scores depend on but the seed: they are not taken for those of an edited study."""
    before = next((one for one in study["defences"] if one["name"] == defence.get("after")), None)
    batteries = [(HERE / "studies" / part["battery"]).read_text(encoding="utf-8") for part in study["parts"]]
    common = [study[key] for key in ("model", "align", "common", "attack_seeds", "prompts", "looks", "parts")]
    chain = [[one["method"], one["options"]] for one in (before, defence) if one]
    return hashlib.sha256(json.dumps([common, batteries, chain]).encode()).hexdigest()[:12]


class Kept:
    """A file of scores, one JSON object a line.

    Args:
        path: Of the file, which need not exist; None for none.

    Raises:
        SystemExit: A line is not of such a file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[tuple[str, int, str], Scores] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        self._rows |= (_row(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1))

    def find(self, study: Mapping[str, Any], defence: Mapping[str, Any], seed: int) -> Scores | None:
        """The scores of one hardened model under this very study; None without."""
        return self._rows.get((defence["name"], seed, digest(study, defence)))

    def add(self, study: Mapping[str, Any], defence: Mapping[str, Any], seed: int, scores: Scores) -> None:
        """Keep, and replace those that an older version of the study left of that model."""
        for key in [key for key in self._rows if key[:2] == (defence["name"], seed)]:
            del self._rows[key]
        self._rows[defence["name"], seed, digest(study, defence)] = scores

    def write(self) -> None:
        """All rows by name and seed, into the file, which is whole at any time."""
        if self._path is not None:
            part = self._path.with_name(f"{self._path.name}.part")
            part.write_text("".join(f"{line}\n" for line in self._lines()), encoding="utf-8")
            part.replace(self._path)

    def _lines(self) -> Iterator[str]:
        for (name, seed, of), scores in sorted(self._rows.items()):
            row = {"defence": name, "seed": seed, "digest": of, "scores": {k: _short(v) for k, v in scores.items()}}
            yield json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def _row(line: str, place: str) -> tuple[tuple[str, int, str], Scores]:
    try:
        row = json.loads(line)
        return (row["defence"], row["seed"], row["digest"]), row["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{place}: not the scores of a defence ({error!r})") from None


def _at(curve: Curve, column: Column) -> list[float] | None:
    """One score a prompt, at the column's step or the last one before it."""
    points = [p for p in curve["points"] if column.step is None or p["step"] <= column.step]
    return (points[-1].get("per_prompt") or {}).get(column.metric) if points else None


def _short(values: Sequence[float]) -> list[float]:
    return [int(value) if float(value).is_integer() else value for value in values]
