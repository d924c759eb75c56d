"""A ratio of two means of pairs, with what it can be: by chance over seeds, and between measured budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from immunity.metrics.breaks import Cell, centre
from immunity.metrics.stats import mean, t_quantile

_NOTHING = 1e-12


class Quotient(NamedTuple):
    """A ratio of means.

    Attributes:
        value: None where the lower mean is 0, or there are no pairs.
        low: Lower end of its 95 % interval; None: no end.
        high: Upper end.
        known: Whether there is an interval at all: two pairs, and a lower mean that cannot be 0.
        gridded: Whether an end is the measuring grid's.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    known: bool = False
    gridded: bool = False


def quotient(
    above: Sequence[float], below: Sequence[float], cells: tuple[Sequence[Cell], Sequence[Cell]], level: float = 0.95
) -> Quotient:
    """The ratio of two means with Fieller's interval, never narrower than what the measuring grid leaves open.

    Args:
        above: A number for each pair.
        below: The other of each pair.
        cells: Between what each number of ``above`` lies, and each of ``below``.
        level: Coverage.
    """
    value = mean(above) / mean(below) if above and abs(mean(below)) > _NOTHING else None
    by_seed, grid = fieller(above, below, level), _divided(centre(cells[0]), centre(cells[1]))
    if value is None or by_seed is None or grid is None or mean(below) <= 0.0:
        return Quotient(value)
    low = None if grid[0] is None else min(grid[0], by_seed[0])
    high = None if grid[1] is None else max(grid[1], by_seed[1])
    return Quotient(value, low, high, known=True, gridded=(low, high) != by_seed)


def fieller(above: Sequence[float], below: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval of a ratio of two means of pairs; None where the lower mean may be 0, as then it has no ends.

    All r for which mean(above - r below) is not significantly different from 0 by a t test.

    Source: Fieller 1954.
    """
    x, y = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if x.size < 2:
        return None
    scale = t_quantile(0.5 + level / 2.0, x.size - 1) ** 2 / x.size
    (xx, xy), (_, yy) = np.cov(x, y) * scale
    a, b, c = float(y.mean() ** 2 - yy), float(x.mean() * y.mean() - xy), float(x.mean() ** 2 - xx)
    if a <= _NOTHING:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


def _divided(above: Cell, below: Cell) -> Cell | None:
    """What a quotient can be, from what both numbers can be; None where the lower one may be 0 or less."""
    least, most = below
    if least is None or least <= 0.0:
        return None
    small, large = above
    shrunk = 0.0 if most is None else 1.0 / most
    low = None if small is None else small * (shrunk if small >= 0.0 else 1.0 / least)
    high = None if large is None else large * (1.0 / least if large >= 0.0 else shrunk)
    return low, high
