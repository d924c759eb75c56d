"""Benchmarks as rows of plain numbers: one for each task and metric, and two models' rows side by side.

A row is a dictionary: ``task``, ``metric``, ``value``, ``low`` and ``high`` (95 %; None if nobody can say),
``interval`` (how they came about), ``n``, ``per_item`` (one value per question in the benchmark's order; None where the
value is not their mean), ``share`` (whether each lies in [0, 1]), ``more`` (whether more is better; None if the
benchmark does not say), ``first`` (whether it is the metric that its task names first), ``group`` ("" or the group that
the task is a part of) and ``items`` (a fingerprint of the questions).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any, Final

import numpy as np

from immunity.errors import DataError
from immunity.metrics.claims import Claim, condition
from immunity.metrics.equivalence import DELTA, difference
from immunity.metrics.stability import Kind, judged, same
from immunity.metrics.stats import finite, wilson

Row = dict[str, Any]
"""See the module."""

WILSON: Final = "Wilson, 95 %"
STDERR: Final = "1.96 standard errors of the benchmark's, 95 %"
_LESS: Final = Kind("rate", 1, both=True, share=True)
_CLOSE: Final = 1e-6


def row(
    task: str,
    metric: str,
    value: object,
    values: Sequence[object],
    *,
    stderr: object = None,
    more: bool | None = True,
    first: bool = True,
    items: Iterable[object] = (),
    group: str = "",
) -> Row:
    """One task and metric.

    Args:
        task: Its name.
        metric: Its name, with that of a filter where there are several.
        value: What the benchmark reports.
        values: One for each question, in the benchmark's order.
        stderr: Standard error of ``value`` by the benchmark, if it knows one.
        more: Whether more is better; None if nobody says.
        first: Whether it is the metric that its task names first.
        items: What the questions are, in the same order.
        group: The group that the task is a part of.
    """
    known = [_number(v) for v in values]
    numbers = [v for v in known if v is not None]
    shown = _number(value)
    mean = bool(numbers) and shown is not None and len(numbers) == len(known)
    mean = mean and math.isclose(fmean(numbers), shown or 0.0, rel_tol=_CLOSE, abs_tol=_CLOSE)
    share = mean and all(0.0 <= v <= 1.0 for v in numbers)
    low, high, how = _interval(shown, _number(stderr), len(numbers) if share else 0)
    return {
        "task": task,
        "metric": metric,
        "value": shown,
        "low": low,
        "high": high,
        "interval": how,
        "n": len(values),
        "per_item": numbers if mean else None,
        "share": share,
        "more": more,
        "first": first,
        "group": group,
        "items": hashlib.sha256("\n".join(map(str, items)).encode()).hexdigest()[:16],
    }


def _number(value: object) -> float | None:
    """As a float: numpy's numbers and truth values are numbers, text is none."""
    plain = value.item() if isinstance(value, np.generic) else value
    return float(plain) if isinstance(plain, bool) else finite(plain)


def _interval(value: float | None, stderr: float | None, n: int) -> tuple[float | None, float | None, str]:
    """Wilson's over ``n`` questions, or with ``n`` = 0 what a standard error gives."""
    if value is None:
        return None, None, ""
    if n:
        return *wilson(min(1.0, max(0.0, value)), n), WILSON
    if stderr is None or stderr <= 0.0:
        return None, None, ""
    half = NormalDist().inv_cdf(0.975) * stderr
    return value - half, value + half, STDERR


def paired(rows: Sequence[Row], baseline: Sequence[Row]) -> list[Row]:
    """Rows for :func:`immunity.metrics.stability.stability`: the first metric of each task, where more is better.

    Args:
        rows: Of the hardened model.
        baseline: Of the one before, on the same questions.

    Returns:
        Each with "task", "kind" and the values per question of "model" and "baseline", a list with one run each. A
        task in parts is one row, that of its group.

    Raises:
        DataError: They were not asked the same.
    """
    return [
        {
            "task": f"{mine['task']} ({mine['metric']})",
            "kind": "accuracy",
            "model": [mine["per_item"]],
            "baseline": [theirs["per_item"]],
        }
        for mine, theirs in _pairs(rows, baseline)
        if mine["first"] and mine["more"] and not mine["group"] and mine["share"] and theirs["share"]
    ]


def compared(rows: Sequence[Row], baseline: Sequence[Row], *, delta: float = DELTA) -> list[Row]:
    """Every row of both models side by side, with the paired difference and whether they are as good as equal.

    Shares are held against ±``delta`` both ways, with Holm's correction of failures over the first metrics of all
    tasks; several tasks are also held together, as one with all their questions. Other means get an interval and no
    verdict, for nobody has said how much they may change; values that are no mean over questions get neither.

    Args:
        rows: Of the hardened model.
        baseline: Of the one before.
        delta: Two models that differ by less are as good as equal.

    Returns:
        Each with ``task``, ``metric``, ``n``, ``first``, ``group``, ``model`` and ``baseline`` (value, low, high), and
        ``difference``, ``low``, ``high`` (90 %), ``verdict`` and ``says``, None or "" where there is none.

    Raises:
        DataError: They were not asked the same.
    """
    pairs = _pairs(rows, baseline)
    shares = [i for i, (mine, theirs) in enumerate(pairs) if mine["share"] and theirs["share"]]
    claims = {i: _claim(*pairs[i], delta) for i in shares}
    tested = [i for i in shares if pairs[i][0]["first"] and not pairs[i][0]["group"]]
    claims |= dict(zip(tested, condition("stability", [claims[i] for i in tested], {}).claims, strict=True))
    shown = [_side_by_side(mine, theirs, claims.get(i)) for i, (mine, theirs) in enumerate(pairs)]
    asked = paired(rows, baseline)
    return [*shown, *([_pooled(asked, delta)] if len(asked) > 1 else [])]


def _pooled(asked: Sequence[Row], delta: float) -> Row:
    """All questions of all tasks as one task: two points take more questions than many a task has."""
    mine, theirs = ([v for one in asked for v in one[who][0]] for who in ("model", "baseline"))
    name = f"all {len(asked)} tasks"
    first, second = (row(name, "first metric of each", fmean(values), values) for values in (mine, theirs))
    return _side_by_side(first, second, same(name, "accuracy", [mine], [theirs], delta=delta)) | {
        "together": len(asked)
    }


def _claim(mine: Row, theirs: Row, delta: float) -> Claim:
    name, model, baseline = f"{mine['task']} ({mine['metric']})", [mine["per_item"]], [theirs["per_item"]]
    if mine["more"] is not False:
        return same(name, "accuracy", model, baseline, delta=delta)
    found = difference(model, baseline)
    return judged(name, _LESS, found, delta=delta, before=theirs["value"], after=mine["value"])


def _side_by_side(mine: Row, theirs: Row, claim: Claim | None) -> Row:
    shown: Row = {key: mine[key] for key in ("task", "metric", "n", "first", "group", "share", "more")} | {
        "together": 0
    }
    shown |= {who: {k: r[k] for k in ("value", "low", "high", "interval")} for who, r in _who(mine, theirs)}
    if claim is not None:
        return shown | {
            "difference": claim.value,
            "low": claim.low,
            "high": claim.high,
            "verdict": claim.verdict,
            "says": claim.says,
        }
    gap: Row = {"difference": None, "low": None, "high": None, "verdict": "", "says": ""}
    if mine["per_item"] is not None and theirs["per_item"] is not None:
        found = difference([mine["per_item"]], [theirs["per_item"]], share=False)
        low, high = found.interval()
        gap |= {"difference": found.value, "low": finite(low), "high": finite(high)}
    return shown | gap


def _who(mine: Row, theirs: Row) -> tuple[tuple[str, Row], tuple[str, Row]]:
    return ("model", mine), ("baseline", theirs)


def _pairs(rows: Sequence[Row], baseline: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same task and metric.

    Raises:
        DataError: One of them is missing, or the questions differ.
    """
    known: Mapping[tuple[str, str], Row] = {(r["task"], r["metric"]): r for r in baseline}
    keys = [(r["task"], r["metric"]) for r in rows]
    if lost := sorted(set(keys) ^ set(known)):
        raise DataError(f"only one of the two models was asked {lost[0][0]} ({lost[0][1]}): ask both the same tasks")
    for mine in rows:
        theirs = known[mine["task"], mine["metric"]]
        if (mine["items"], mine["n"]) != (theirs["items"], theirs["n"]):
            raise DataError(
                f"{mine['task']}: the two models were not asked the same questions ({mine['n']} and {theirs['n']}); "
                "its data changed in between: remove what is kept of it and ask both again"
            )
    return [(mine, known[key]) for mine, key in zip(rows, keys, strict=True)]
