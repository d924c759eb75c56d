"""Two models on the same prompts: how far apart they are, and whether they are as good as equal.

"No significant difference" is not "the same": a small test finds none. So equivalence is what has to be shown: two
one-sided tests (TOST), of which both must reject, that the difference is beyond -δ and that it is beyond +δ. That is
the same as asking the 90 % interval of the paired difference to lie within ±δ.

Differences of rates get four made-up prompts, two on which only the one model succeeds and two on which only the other
does, as Agresti and Coull (1998) add two successes and two failures to one rate. Without them two models that gave the
same answer a hundred times would be "equal within ±0 points"; with them, within ±3.2, which is near the exact 2.95.
With only one on each side, a model that is worse by just δ would pass one time in ten instead of in twenty.

Losses that are the same on every prompt are the same only as far as they were computed: their interval is as wide as
single precision, not empty.

Answers without a score are not guessed. For rates each end of the interval is computed with the missing scores as bad
for that end as they can be; for losses, which have no worst case, the pair is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from immunity.errors import SettingsError
from immunity.metrics.stats import FEW, Interval, Rows, grid, resampled, t_cdf, t_quantile, two_way_se

DELTA: Final = 0.02
"""Two points: rates that differ by less are as good as equal."""

LEVEL: Final = 0.90
"""Of the interval that two one-sided tests at 5 % amount to."""


_FINEST: Final = float(np.finfo(np.float32).eps)
"""No mean is known better."""


@dataclass(frozen=True, eq=False)
class Side:
    """What is known about a mean: a t distribution, or resampled means where there are any.

    Attributes:
        centre: Its mean.
        se: Standard error.
        df: Degrees of freedom.
        draws: Sorted resampled means; empty for a t distribution.
    """

    centre: float
    se: float
    df: float
    draws: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def quantile(self, p: float) -> float:
        """Where an interval with ``p`` below it ends."""
        if self.draws.size:
            return float(np.quantile(self.draws, p))
        return self.centre + (t_quantile(p, self.df) * self.se if self.se > 0.0 else 0.0)

    def p_above(self, limit: float) -> float:
        """The p-value of "the mean is at most ``limit``": small where it is above."""
        if self.draws.size:
            return float(1 + (self.draws <= limit).sum()) / (1 + self.draws.size)
        if self.se == 0.0:
            return 0.0 if self.centre > limit else 1.0
        return t_cdf((limit - self.centre) / self.se, self.df)

    def p_below(self, limit: float) -> float:
        """The p-value of "the mean is at least ``limit``": small where it is below."""
        return Side(-self.centre, self.se, self.df, -self.draws).p_above(-limit)


@dataclass(frozen=True, eq=False)
class Difference:
    """The paired difference of two models, the first minus the second.

    Attributes:
        value: Over the pairs that both have scores for; nothing added.
        lower: What its lower end is read from.
        upper: What its upper end is read from; the same unless answers are unscored.
        n: Prompts with at least one pair.
        seeds: Of the model that has more.
        unscored: Pairs in which a score is missing.
        share: Whether both are rates, so that no more than 1 can lie between them.
    """

    value: float
    lower: Side
    upper: Side
    n: int
    seeds: int
    unscored: int
    share: bool = True

    @property
    def se(self) -> float:
        """The larger standard error of both sides."""
        return max(self.lower.se, self.upper.se)

    @property
    def mde(self) -> float:
        """The least true difference that this many prompts and seeds would find 4 times in 5, at 5 % two-sided."""
        df = min(self.lower.df, self.upper.df)
        return (t_quantile(0.975, df) + t_quantile(0.80, df)) * self.se

    def interval(self, level: float = LEVEL) -> Interval:
        """The interval at a level; it always holds the value, and ends at ±1 for rates unless nothing bounds it."""
        ends = self.lower.quantile(0.5 - level / 2.0), self.upper.quantile(0.5 + level / 2.0)
        low, high = (max(-1.0, min(end, 1.0)) if self.share and math.isfinite(end) else end for end in ends)
        return Interval(min(low, self.value), max(high, self.value))


class Tost(NamedTuple):
    """An equivalence test.

    Attributes:
        difference: What was tested.
        low: Lower end of its 90 % interval.
        high: Upper end.
        p: Of "they differ by ``delta`` or more".
        p_less: Of "the first is at least the second minus ``delta``": small where it is worse by more.
        p_more: Of "the first is at most the second plus ``delta``".
        equivalent: Whether the interval lies within ±``delta``.
    """

    difference: Difference
    delta: float
    low: float
    high: float
    p: float
    p_less: float
    p_more: float
    equivalent: bool


def difference(model: Rows, baseline: Rows, *, share: bool = True, draws: int = 2000, seed: int = 0) -> Difference:
    """How far a model is from another on the same prompts, with both the prompts and the seeds drawn.

    One seed: a t interval over the prompts, which says nothing about another seed. Two or three: two-way t. More: the
    two-way bootstrap. A model with one seed stands beside each seed of the other, as the fixed model that it is.

    Args:
        model: [S, n].
        baseline: [S, n] or, for either, [1, n]; the same prompts in the same order.
        share: Whether the values are rates in [0, 1]: then four prompts are made up and missing scores are bounded.
        draws: Resamples.
        seed: Of the resampling.

    Raises:
        SettingsError: The prompts or the seeds do not match, there is no pair, or a rate is not in [0, 1].
    """
    first, second = _side_by_side(model, baseline)
    if share and any(bool(((t < 0.0) | (t > 1.0)).any()) for t in (first, second)):
        raise SettingsError("a share must lie in [0, 1]; divide percentages by 100, or compare them as losses")
    gaps = first - second
    known = ~np.isnan(gaps)
    if not known.any():
        raise SettingsError("no prompt was scored for both models: there is no difference to speak of")
    missing = int(gaps.size - known.sum())
    lower = _known(gaps if not (share and missing) else _filled(first, 0.0) - _filled(second, 1.0), share, draws, seed)
    upper = lower
    if share and missing:
        upper = _known(_filled(first, 1.0) - _filled(second, 0.0), share, draws, seed)
    n = int(known.any(axis=0).sum())
    return Difference(float(gaps[known].mean()), lower, upper, n, len(gaps), missing, share)


def tost(model: Rows, baseline: Rows, *, delta: float = DELTA, share: bool = True) -> Tost:
    """Two one-sided tests at 5 % each of whether two models are as good as equal.

    Args:
        model: See :func:`difference`.
        baseline: The same.
        delta: They are, if they differ by less: a share, or nats for losses.
        share: See :func:`difference`.

    Raises:
        SettingsError: ``delta`` is not positive, or see :func:`difference`.

    Source: Schuirmann 1987.
    """
    return against(difference(model, baseline, share=share), delta)


def against(found: Difference, delta: float) -> Tost:
    """:func:`tost` of a difference that is known already.

    Raises:
        SettingsError: ``delta`` is not positive.
    """
    if not delta > 0.0:
        raise SettingsError(f"delta is {delta!r}, but nothing is equal to within less than a positive number")
    low, high = found.interval(LEVEL)
    return Tost(
        difference=found,
        delta=delta,
        low=low,
        high=high,
        p=max(found.lower.p_above(-delta), found.upper.p_below(delta)),
        p_less=found.upper.p_below(-delta),
        p_more=found.lower.p_above(delta),
        equivalent=-delta < low and high < delta,
    )


def _known(gaps: NDArray[np.float64], share: bool, draws: int, seed: int) -> Side:
    """What is known about the mean of [S, n] differences."""
    table = np.hstack([gaps, np.tile([1.0, 1.0, -1.0, -1.0], (len(gaps), 1))]) if share else gaps
    known = ~np.isnan(table)
    centre, se = float(table[known].mean()), max(two_way_se(table), _FINEST)
    prompts = int(known.any(axis=0).sum())
    if len(table) == 1:
        return Side(centre, se if prompts > 1 else math.inf, max(1, prompts - 1))
    few = len(table) <= FEW or bool(np.ptp(table[known]) == 0.0)
    return Side(centre, se, len(table) - 1, np.empty(0) if few else np.sort(resampled(table, draws, seed)))


def _filled(table: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    return np.where(np.isnan(table), value, table)


def _side_by_side(model: Rows, baseline: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = grid(model), grid(baseline)
    if first.shape[1] != second.shape[1]:
        raise SettingsError(f"{first.shape[1]} prompts against {second.shape[1]}: ask both models the same prompts")
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise SettingsError(f"{len(first)} seeds against {len(second)}: give both models the same seeds, or one of one")
    seeds = max(len(first), len(second))
    return np.repeat(first, seeds // len(first), axis=0), np.repeat(second, seeds // len(second), axis=0)
