"""Attacks domain by domain, on a hardened model and on its baseline: rows, their cost ratios, and the matrix of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from immunity.errors import DataError
from immunity.metrics.breaks import Rho, Run, cost_ratio
from immunity.metrics.outset import outset
from immunity.metrics.stats import finite

FINE_TUNING: Final = "sft"
"""The threat that the definition is about."""

ROLES: Final = ("defended", "baseline")


def checked(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that lack what the others are read from.

    Raises:
        DataError: A row's model is not one of the two, it lacks its domain, its seed or its budgets, or was broken by
            fine-tuning at 0 and does not say how harmful it was.
    """
    for i, row in enumerate(rows):
        if row.get("model") not in ROLES:
            raise DataError(f"row {i}: model is {row.get('model')!r}; use {' or '.join(ROLES)}")
        if not row.get("domain") or row.get("tried") is None or row.get("seed") is None:
            raise DataError(f"row {i}: a run needs its domain, its seed and the greatest budget that was tried")
        tuned = (row.get("threat") or FINE_TUNING) == FINE_TUNING
        if tuned and row.get("at") == 0 and finite(row.get("released")) is None:
            raise DataError(f"row {i}: a model that was broken at 0 needs `released`, its harm before the attack")


def rows_of(
    rows: Sequence[Mapping[str, Any]], role: str, name: str, domain: str, threat: str
) -> list[Mapping[str, Any]]:
    """The rows of one cell. The baseline is the same for every defence."""
    return [
        row
        for row in rows
        if (row["model"], row["domain"], row.get("threat") or FINE_TUNING) == (role, domain, threat)
        and (role == "baseline" or not name or row.get("defence", name) == name)
    ]


def _run(row: Mapping[str, Any]) -> Run:
    at, before = row.get("at"), row.get("before")
    if before is None:
        before = row["tried"] if at is None else 0.0
    return Run(str(row.get("attack") or ""), int(row["seed"]), at, before, row["tried"])


def ratio(rows: Sequence[Mapping[str, Any]], name: str, domain: str, threat: str) -> Rho:
    """The cost ratio in one cell."""
    return cost_ratio(*([_run(row) for row in rows_of(rows, role, name, domain, threat)] for role in ROLES))


def seen(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> list[str]:
    """The domains, or threats (``key``), that a hardened model was attacked in."""
    mine = [row for row in rows if row["model"] == "defended" and (not name or row.get("defence", name) == name)]
    return list(dict.fromkeys(str(row.get(key) or FINE_TUNING) for row in mine))


def matrix(rows: Sequence[Mapping[str, Any]], by_name: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Every cell that was attacked, raw."""
    cells = []
    for name, domains in by_name.items():
        for domain in seen(rows, "domain", name):
            for threat in seen(rows, "threat", name):
                rho = ratio(rows, name, domain, threat)
                sides = {role: _cell(rows_of(rows, role, name, domain, threat)) for role in ROLES}
                if sides["defended"]["tried"]:
                    place = {"defence": name, "domain": domain, "threat": threat, "held_out": domain not in domains}
                    cells.append({**place, "ratio": rho.plain(), **sides})
    return cells


def _cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Break times and harm of one model in one domain under one threat, and its harm as released."""
    harm, start = [row["harm"] for row in rows if row.get("harm") is not None], outset(rows)
    return {
        **{key: [row.get(key) for row in rows] for key in ("seed", "at", "tried")},
        "harm": max(harm, default=None),
        "released": None if start is None else {"harm": start.harm, "n": start.n},
    }
