"""How long a model holds out: break times over seeds and attacks, those that never came included, and what is gained.

A run that did not break its model by the end is *censored* there: the break is later, or never. Kaplan and Meier's
curve S(b) is the share of runs that a model has survived at a budget b. RMST = ∫ S(b) d log b, from the least budget
to a common horizon, is the mean of the logarithm of the budget that was survived, up to that horizon: a difference of
two RMSTs is the logarithm of a cost ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from immunity.errors import SettingsError
from immunity.metrics.breaks import Run, reached
from immunity.metrics.stats import Interval, t_quantile


class Survival(NamedTuple):
    """Kaplan and Meier's curve of one model.

    Attributes:
        steps: [budget, S, low, high] at each break, each a 95 % interval at that budget alone; S is 1 before the first.
        runs: How many.
        broke: How many broke.
        start: Where RMST begins: the least budget of any kind.
        horizon: Where it ends.
        rmst: In units of log budget, at most log(horizon / start).
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    steps: list[list[float]]
    runs: int
    broke: int
    start: float
    horizon: float
    rmst: float
    low: float
    high: float


def kaplan_meier(
    runs: Sequence[Run], *, start: float | None = None, horizon: float | None = None, level: float = 0.95
) -> Survival:
    """The survival curve of a model over its runs.

    The interval of RMST is Greenwood's, on the runs and two made-up ones, of which one broke at once and one never: so
    it is not empty where all runs ended alike.

    Args:
        runs: Of one model, on one axis; seeds and attacks count alike.
        start: Where RMST begins; the least positive budget if None.
        horizon: Where it ends; the greatest budget that any run was tried at if None, and never beyond it.
        level: Coverage.

    Raises:
        SettingsError: There are no runs, or no positive budget.

    Source: Kaplan and Meier 1958; the curve is ``scipy.stats.ecdf``'s; log-log limits by Kalbfleisch and Prentice.
    """
    positive = [b for run in runs for b in (run.at, run.before, run.tried) if b]
    if not positive:
        raise SettingsError("survival needs at least one run with a positive budget")
    first, last = start or min(positive), max(run.tried for run in runs)
    last = max(first, min(last, horizon or last))
    z = t_quantile(0.5 + level / 2.0, math.inf)
    times, share, variance = _curve(runs)
    steps = [
        [float(t), float(s), *_ends(float(s), float(v), len(runs), z)]
        for t, s, v in zip(times, share, variance, strict=True)
    ]
    added = [*runs, Run("", -1, 0.0, 0.0, last), Run("", -2, None, last, last)]
    centre, error = _area(*_curve(added), first, last)
    value = _area(times, share, variance, first, last)[0]
    half, whole = z * error, math.log(last / first)
    low, high = max(0.0, min(value, centre - half)), min(whole, max(value, centre + half))
    broke = sum(run.at is not None for run in runs)
    return Survival(steps, len(runs), broke, first, last, value, low, high)


def gain(defended: Survival, baseline: Survival) -> tuple[float, Interval]:
    """How much longer a model survives than another: the difference of RMSTs, and its 95 % interval.

    Raises:
        SettingsError: They do not begin and end at the same budgets.
    """
    if (defended.start, defended.horizon) != (baseline.start, baseline.horizon):
        raise SettingsError("two RMSTs are comparable only from the same start to the same horizon; give both")
    value = defended.rmst - baseline.rmst  # ends by MOVER (Zou and Donner 2008): each side with its own half
    low = math.hypot(defended.rmst - defended.low, baseline.high - baseline.rmst)
    high = math.hypot(defended.high - defended.rmst, baseline.rmst - baseline.low)
    return value, Interval(value - low, value + high)


def both(defended: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any] | None:
    """Both survival curves on one axis, from the same start to the same horizon, and the gain, as JSON-plain data.

    Returns:
        ``defended`` and ``baseline`` (the fields of :class:`Survival`; None where it was not attacked), and ``gain``:
        ``value``, ``low``, ``high`` in log budget, or None where there is one budget only. None if nothing was tried
        at a positive budget.
    """
    sides = {"defended": defended, "baseline": baseline}
    budgets = [b for side in sides.values() for run in side for b in (run.at, run.before, run.tried) if b]
    if not budgets:
        return None
    start, horizon = min(budgets), min(max(run.tried for run in side) for side in sides.values() if side)
    made = {
        role: kaplan_meier(side, start=start, horizon=horizon) if side and horizon > 0.0 else None
        for role, side in sides.items()
    }
    mine, theirs = made["defended"], made["baseline"]
    more = None
    if mine is not None and theirs is not None and start < horizon:
        value, ends = gain(mine, theirs)
        more = {"value": value, "low": ends.low, "high": ends.high}
    return {**{role: None if one is None else one._asdict() for role, one in made.items()}, "gain": more}


_Vector: TypeAlias = NDArray[np.float64]


def _curve(runs: Sequence[Run]) -> tuple[_Vector, _Vector, _Vector]:
    """Times of breaks, S just after each, and Greenwood's sum d / (n (n - d)) up to each (infinite where S is 0)."""
    from scipy.stats import CensoredData, ecdf

    ends = np.array([reached(run) for run in runs])
    broke = np.array([run.at is not None for run in runs])
    if not broke.any():
        return np.empty(0), np.empty(0), np.empty(0)
    curve = ecdf(CensoredData(uncensored=ends[broke], right=ends[~broke])).sf
    times = np.unique(ends[broke])
    d = np.array([(ends[broke] == t).sum() for t in times], dtype=np.float64)
    n = np.array([(ends >= t).sum() for t in times], dtype=np.float64)
    sums = np.cumsum(np.divide(d, n * (n - d), out=np.full_like(d, np.inf), where=n > d))
    return times, np.asarray(curve.evaluate(times), dtype=np.float64), sums


def _area(times: _Vector, share: _Vector, sums: _Vector, start: float, horizon: float) -> tuple[float, float]:
    """RMST on log budgets and its standard error."""
    inside = (times > start) & (times < horizon)
    before = share[times <= start]
    begin = float(before[-1]) if before.size else 1.0
    knots = np.log(np.concatenate([[start], times[inside], [horizon]]))
    heights = np.concatenate([[begin], share[inside]])
    pieces = heights * np.diff(knots)
    left = np.cumsum(pieces[::-1])[::-1]  # the area from each knot on
    jumps = np.diff(np.concatenate([[0.0], np.where(np.isfinite(sums), sums, 0.0)]))
    from_knot = np.concatenate([np.full(before.size, left[0]), left[1:]])
    known = np.isfinite(sums) & (times < horizon)
    variance = (
        float((from_knot[known[: from_knot.size]] ** 2 * jumps[: known.size][known]).sum()) if times.size else 0.0
    )
    return float(pieces.sum()), math.sqrt(variance)


def _ends(share: float, sums: float, n: int, z: float) -> tuple[float, float]:
    """The limits of S at one budget: log-log, or exact where nothing or everything is left."""
    if share <= 0.0:
        return 0.0, 1.0 - _tail(z) ** (1.0 / n)
    spread = z * math.sqrt(sums) / abs(math.log(share)) if share < 1.0 else 0.0
    return share ** math.exp(spread), share ** math.exp(-spread)


def _tail(z: float) -> float:
    """The probability beyond z on one side of the normal distribution."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))
