"""Two judges of the same answers: how often they agree, how much of that is chance, and where they do not.

Raw agreement is easy to read and says little where nearly all answers are alike. Cohen's κ and Krippendorff's α take
off what chance would give; both are undefined where only one category occurs, and near 0 there however well judges
agree. So all three are given, with the cell in which the judges differ most: two judges that move in opposite
directions are not averaged away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from immunity.errors import SettingsError
from immunity.metrics.stats import Interval, wilson


class Agreement(NamedTuple):
    """What two judges have in common.

    Attributes:
        n: Answers that both scored.
        unscored: Answers that the first, the second judge left without a score.
        raw: Share of the n answers that they judge alike; None if n is 0.
        interval: Wilson's, of ``raw``.
        kappa: Cohen's; None where it is undefined.
        kappa_interval: 95 %, a bootstrap over answers; None where they show no spread.
        alpha: Krippendorff's, nominal; None where it is undefined.
        alpha_interval: 95 %, from the same bootstrap.
        cells: (what the first said, what the second said) -> answers.
        worst: The cell of disagreement with the most answers; None if they never differ.
    """

    n: int
    unscored: tuple[int, int]
    raw: float | None
    interval: Interval | None
    kappa: float | None
    kappa_interval: Interval | None
    alpha: float | None
    alpha_interval: Interval | None
    cells: dict[tuple[Hashable, Hashable], int]
    worst: tuple[Hashable, Hashable] | None


class Bounds(NamedTuple):
    """A rate with answers that could not be scored.

    Attributes:
        value: Over the scored answers; None if there are none.
        low: If all unscored ones were 0.
        high: If all were 1.
        interval: From the lower end of Wilson's interval of ``low`` to the upper end of that of ``high``.
        unscored: How many.
        n: Answers, unscored ones included.
    """

    value: float | None
    low: float
    high: float
    interval: Interval
    unscored: int
    n: int


def bounds(scores: Sequence[float | None], *, level: float = 0.95) -> Bounds:
    """A rate between its worst case and its best case; an unscored answer is never put in the middle.

    Args:
        scores: In [0, 1]; None where the judge gave no readable answer.
        level: Of Wilson's intervals.

    Raises:
        SettingsError: There are no scores.
    """
    if not scores:
        raise SettingsError("the bounds of no scores do not exist")
    known = [score for score in scores if score is not None]
    n, total = len(scores), float(sum(known))
    low, high = total / n, min(1.0, (total + n - len(known)) / n)
    ends = Interval(wilson(low, n, level).low, wilson(high, n, level).high)
    return Bounds(total / len(known) if known else None, low, high, ends, n - len(known), n)


def agreement(
    first: Sequence[Hashable | None], second: Sequence[Hashable | None], *, draws: int = 2000, seed: int = 0
) -> Agreement:
    """How far two judges agree about the same answers.

    Args:
        first: Category of each answer (True and False, or names); None where it has none.
        second: The same answers, in the same order.
        draws: Resamples for the intervals of κ and α.
        seed: Of the resampling.

    Raises:
        SettingsError: They did not judge the same number of answers.
    """
    if len(first) != len(second):
        raise SettingsError(f"{len(first)} answers against {len(second)}: both judges must see the same answers")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    unscored = (sum(a is None for a in first), sum(b is None for b in second))
    cells = Counter(pairs)
    if not pairs:
        return Agreement(0, unscored, None, None, None, None, None, None, {}, None)
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    table = np.array([[cells[a, b] for b in names] for a in names], dtype=np.float64)
    n = len(pairs)
    raw = float(np.trace(table)) / n
    again = np.random.default_rng(seed).multinomial(n, (table / n).ravel(), size=draws).reshape(draws, *table.shape)
    differ = {pair: count for pair, count in cells.items() if pair[0] != pair[1]}
    return Agreement(
        n=n,
        unscored=unscored,
        raw=raw,
        interval=wilson(raw, n),
        kappa=_one(_kappa(table[None])),
        kappa_interval=_spread(_kappa(again.astype(np.float64))),
        alpha=_one(_alpha(table[None])),
        alpha_interval=_spread(_alpha(again.astype(np.float64))),
        cells=dict(cells),
        worst=max(differ, key=differ.__getitem__) if differ else None,
    )


def krippendorff(
    judges: Sequence[Sequence[float | None]], *, scale: Literal["nominal", "interval"] = "nominal"
) -> float | None:
    """Krippendorff's α of any number of judges, with gaps; None where it is undefined.

    α = 1 - D_o / D_e: the disagreement between judges of the same answer, over that between any two scores. Answers
    with fewer than two scores say nothing and are left out.

    Args:
        judges: [J, n]: the scores of each judge, in the same order; None where there is none.
        scale: Whether scores are names that are the same or not, or numbers that are nearer or farther.

    Raises:
        SettingsError: The judges did not see the same number of answers.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    if len({len(scores) for scores in judges}) != 1:
        raise SettingsError("all judges must see the same answers; put None where one has no score")
    units = [[score for score in unit if score is not None] for unit in zip(*judges, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    pool = np.array([score for unit in units for score in unit], dtype=np.float64)
    if not units or np.ptp(pool) == 0.0:
        return None
    observed = sum(_apart(np.array(unit, dtype=np.float64), scale) / (len(unit) - 1) for unit in units) / pool.size
    expected = _apart(pool, scale) / (pool.size * (pool.size - 1))
    return 1.0 - observed / expected


def _apart(values: NDArray[np.float64], scale: str) -> float:
    """The sum of distances over all ordered pairs."""
    if scale == "interval":
        return float(2.0 * (values.size * (values**2).sum() - values.sum() ** 2))
    counts = np.unique(values, return_counts=True)[1]
    return float(values.size**2 - (counts**2).sum())


def _kappa(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cohen's κ of [B, k, k] tables of counts; NaN where it is undefined."""
    n = tables.sum(axis=(1, 2))
    agreed = np.trace(tables, axis1=1, axis2=2) / n
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1) / n**2
    found: NDArray[np.float64] = np.divide(
        agreed - chance, 1.0 - chance, out=np.full_like(n, np.nan), where=chance < 1.0
    )
    return found


def _alpha(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Krippendorff's nominal α of [B, k, k] tables of counts of two judges; NaN where it is undefined."""
    n = tables.sum(axis=(1, 2))
    observed = 1.0 - np.trace(tables, axis1=1, axis2=2) / n
    both = tables.sum(axis=1) + tables.sum(axis=2)
    expected = 1.0 - (both * (both - 1.0)).sum(axis=1) / (2.0 * n * (2.0 * n - 1.0))
    found: NDArray[np.float64] = 1.0 - np.divide(observed, expected, out=np.full_like(n, np.nan), where=expected > 0.0)
    return found


def _one(values: NDArray[np.float64]) -> float | None:
    return None if np.isnan(values[0]) else float(values[0])


def _spread(values: NDArray[np.float64]) -> Interval | None:
    """The middle 95 %; None where it would be empty, or more than a twentieth of the resamples have no value.

    Judges that never differed agree in every resample, which says nothing of how well they would agree elsewhere.
    """
    known = values[~np.isnan(values)]
    if known.size < 0.95 * values.size:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(low), float(high)) if low < high else None
