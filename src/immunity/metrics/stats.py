"""The few statistics that every table needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from immunity.errors import SettingsError

FEW: Final = 3
"""Up to so many seeds the t interval is used, from there on the bootstrap."""

Rows: TypeAlias = Sequence[Sequence[float | None]]
"""[S, n]: for each seed, one value per prompt, the same prompts in each; None where there is no score."""


class Interval(NamedTuple):
    """Two ends of an interval, ``low <= high``."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies inside, the ends included."""
        return self.low <= value <= self.high


def wilson(share: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share that was observed over ``n`` prompts of one run.

    Solves (p - share)^2 = z^2 p (1 - p) / n for p (Wilson 1927), so it stays inside [0, 1] and is not empty at 0 or 1,
    where the textbook interval has width 0. A graded judge gives shares that are no multiple of 1/n; the formula takes
    them, and is then conservative, because grades between 0 and 1 vary less than coin tosses of the same mean.
    It covers the draw of the prompts only: how much another seed would change is not in it.

    Args:
        share: In [0, 1].
        n: How many prompts it was taken over, at least 1.
        level: Coverage, strictly between 0 and 1.

    Raises:
        SettingsError: An argument is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise SettingsError(f"a share must lie in [0, 1], not {share!r}; divide percentages by 100")
    if n < 1:
        raise SettingsError(f"an interval needs at least one prompt, not n = {n}")
    if not 0.0 < level < 1.0:
        raise SettingsError(f"the level must lie strictly between 0 and 1, not {level!r}")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    weight = 1.0 / (1.0 + z * z / n)
    centre = weight * (share + z * z / (2.0 * n))
    half = weight * z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    return Interval(max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def finite(value: object) -> float | None:
    """``value`` as a float if it is a finite number, else None: missing, NaN, infinite, text, truth values."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, summed exactly: the order of the values cannot change it.

    Raises:
        SettingsError: There is nothing to average.
    """
    if not values:
        raise SettingsError("the mean of no values does not exist")
    return math.fsum(values) / len(values)


def sd(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, with n - 1; None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def two_way(rows: Rows, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """An interval for the mean of rates in [0, 1] over seeds *and* prompts: both are drawn anew, with replacement.

    The "pigeonhole" bootstrap: seeds and prompts are crossed, so each is resampled by itself and a cell counts as often
    as its row and its column were drawn. Pooling seeds × prompts into one binomial covers far less than it says,
    because two seeds share their prompts. Where all values are equal, resampling shows no spread at all; then it is
    Wilson's interval on the number of prompts. With two or three seeds :func:`two_way_t` is the safer one.

    Args:
        rows: At least two seeds.
        draws: Resamples.
        level: Coverage, strictly between 0 and 1.
        seed: Of the resampling.

    Raises:
        SettingsError: There are fewer than two seeds, rows of different lengths, or no values.

    Source: Owen 2007, "The pigeonhole bootstrap", arXiv 0711.1111.
    """
    table = grid(rows, seeds=2)
    known = ~np.isnan(table)
    centre = float(table[known].mean())
    if np.ptp(table[known]) == 0.0:
        return wilson(centre, int(known.any(axis=0).sum()), level)
    low, high = np.quantile(resampled(table, draws, seed), [0.5 - level / 2.0, 0.5 + level / 2.0])
    return Interval(max(0.0, min(float(low), centre)), min(1.0, max(float(high), centre)))


def two_way_t(rows: Rows, *, level: float = 0.95) -> Interval:
    """The same interval without resampling: Student's t, with :func:`two_way_se` and one degree less than seeds.

    Conservative, and wide: t has the few degrees that seeds give also where prompts make most of the error. It holds
    its level at two and three seeds, where a bootstrap over so few does not.

    Args:
        rows: At least two seeds of rates in [0, 1].
        level: Coverage, strictly between 0 and 1.

    Raises:
        SettingsError: There are fewer than two seeds, rows of different lengths, or no values.
    """
    table = grid(rows, seeds=2)
    known = ~np.isnan(table)
    centre = float(table[known].mean())
    if np.ptp(table[known]) == 0.0:
        return wilson(centre, int(known.any(axis=0).sum()), level)
    half = t_quantile(0.5 + level / 2.0, len(table) - 1) * two_way_se(table)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def rate(rows: Rows, *, level: float = 0.95) -> Interval:
    """The interval of a mean rate by how many seeds there are: 1, Wilson's; 2 or 3, two-way t; more, the bootstrap.

    Raises:
        SettingsError: There are no seeds, rows of different lengths, or no values.
    """
    table = grid(rows)
    if len(table) > 1:
        return two_way_t(rows, level=level) if len(table) <= FEW else two_way(rows, level=level)
    known = table[~np.isnan(table)]
    return wilson(float(known.mean()), known.size, level)


def two_way_se(table: NDArray[np.float64]) -> float:
    """The standard error of a crossed mean: what its rows vary by and what its columns vary by, added up.

    se² = var(row means) / S + var(column means) / n, from [S, n] with NaN where there is no score. What is left of a
    cell after its row and its column is counted in both, which errs on the wide side. One row has no spread, and its
    part is 0: then it is the error of the prompts only. Rows and columns may all have one mean by chance, so it is
    never less than the error of as many independent cells: 0 only where all cells are equal.
    """
    parts = []
    for axis in (1, 0):
        known = ~np.isnan(table)
        count = known.sum(axis=axis)
        sums = np.where(known, table, 0.0).sum(axis=axis)
        means = sums[count > 0] / count[count > 0]
        parts.append(float(means.var(ddof=1)) / means.size if means.size > 1 else 0.0)
    cells = table[~np.isnan(table)]
    least = float(cells.var(ddof=1)) / cells.size if cells.size > 1 else 0.0
    return math.sqrt(max(sum(parts), least))


def resampled(table: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Means of ``draws`` two-way resamples of [S, n]; a resample in which nothing is known is left out."""
    generator = np.random.default_rng(seed)
    known = ~np.isnan(table)
    n_seeds, n_prompts = table.shape
    by_seed = generator.multinomial(n_seeds, np.full(n_seeds, 1.0 / n_seeds), size=draws)
    by_prompt = generator.multinomial(n_prompts, np.full(n_prompts, 1.0 / n_prompts), size=draws)
    total = ((by_seed @ np.where(known, table, 0.0)) * by_prompt).sum(axis=1)
    count = ((by_seed @ known.astype(np.float64)) * by_prompt).sum(axis=1)
    means: NDArray[np.float64] = total[count > 0] / count[count > 0]
    return means


def grid(rows: Rows, *, seeds: int = 1) -> NDArray[np.float64]:
    """[S, n], NaN where there is no score.

    Raises:
        SettingsError: There are fewer than ``seeds`` seeds, rows of different lengths, or no values.
    """
    lengths = {len(row) for row in rows}
    if len(rows) < seeds or len(lengths) != 1 or 0 in lengths:
        least = "two seeds" if seeds == 2 else "one seed"
        raise SettingsError(
            f"{len(rows)} seeds with {sorted(lengths)} prompts: give at least {least} with the same prompts each"
        )
    table = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)
    if np.isnan(table).all():
        raise SettingsError("an interval of no scores does not exist")
    return table


def t_quantile(p: float, df: float) -> float:
    """The quantile of Student's t; of the normal distribution for infinite ``df``."""
    from scipy.special import stdtrit

    return NormalDist().inv_cdf(p) if math.isinf(df) else float(stdtrit(df, p))


def t_cdf(x: float, df: float) -> float:
    """The distribution function of Student's t; of the normal distribution for infinite ``df``."""
    from scipy.special import stdtr

    return NormalDist().cdf(x) if math.isinf(df) else float(stdtr(df, x))
