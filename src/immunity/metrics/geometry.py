"""The shape of a trap's basin, read off curves of ℓ_collapse over distance. Diagnostic numbers, and no verdicts.

ℓ_collapse FALLS where a trap fires. Curves are read as straight lines between the measured distances, and only up to
the first point where a loss is not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypedDict

from immunity.errors import SettingsError
from immunity.metrics.stats import finite, mean, sd, t_quantile

LEFT: Final = 0.5
"""A basin begins where ℓ_collapse falls below so much of the less of two values (:func:`level_of`)."""
_DONE: Final = 0.95
"""Directions are compared at the nearest distance at which the harmful one has done so much of its fall."""
HARMFUL: Final = "harmful"
"""The direction that the others are compared with: the normalised step down the harmful gradient."""

Points = Sequence[tuple[float, float]]
"""(distance, value) from 0 upwards."""
Row = Mapping[str, Any]


class Basin(NamedTuple):
    """What one curve shows.

    Attributes:
        depth: How far ℓ_collapse falls from its value at the model, at the most; 0 if it only rises.
        lowest: Its lowest value.
        at: The nearest distance where it has that.
        onset: The first distance where it is at the level; None if it never is.
        width: From there to where it first comes back above the level, or to the end of the curve.
        inside: The length of all stretches below the level, the first one's width among them.
        open: Whether the end of the curve came first, so that the basin is at least so wide.
        end: The greatest distance that was measured.
    """

    depth: float
    lowest: float
    at: float
    onset: float | None
    width: float | None
    inside: float
    open: bool
    end: float


class Spread(TypedDict):
    """A mean over draws with its 95 % t interval; no ends for a single draw."""

    mean: float
    low: float | None
    high: float | None
    n: int


def level_of(at_home: float, chance: float, left: float = LEFT) -> float:
    """Where a basin begins: ``left`` times the less of ℓ_collapse at the model and ``chance``.

    Half of what it was is not enough by itself: weights that are moved far know nothing any more, and a model that
    knows nothing has ln V, which may be less than half.

    Args:
        at_home: ℓ_collapse at the model.
        chance: ln V, of a vocabulary of V tokens.
        left: Strictly between 0 and 1.

    Raises:
        SettingsError: ``left`` is out of range.
    """
    if not 0.0 < left < 1.0:
        raise SettingsError(f"left = {left}: a basin begins at a part of the loss, strictly between 0 and 1")
    return left * min(at_home, chance)


def basin(points: Points, level: float) -> Basin:
    """Depth, onset and width along one curve.

    Args:
        points: At least one; the first is the model itself.
        level: See :func:`level_of`.

    Raises:
        SettingsError: There are no points, or their distances do not rise.
    """
    if not points or any(b <= a for (a, _), (b, _) in itertools.pairwise(points)):
        raise SettingsError("a basin needs points, the model first and the others at rising distances")
    lowest, at = min((value, distance) for distance, value in points)
    onset, back = _crossings(points, level)
    end = points[-1][0]
    width = None if onset is None else (end if back is None else back) - onset
    inside = sum(_below(*ends, level) for ends in itertools.pairwise(points))
    return Basin(points[0][1] - lowest, lowest, at, onset, width, inside, onset is not None and back is None, end)


def _below(left: tuple[float, float], right: tuple[float, float], level: float) -> float:
    """How much of the way from one point to the next is below the level."""
    length, low, high = right[0] - left[0], min(left[1], right[1]), max(left[1], right[1])
    if high <= level:
        return length
    return length * (level - low) / (high - low) if low < level else 0.0


def _crossings(points: Points, level: float) -> tuple[float | None, float | None]:
    """Where straight lines between the points first come down to the level, and where they next go above it."""
    onset = points[0][0] if points[0][1] <= level else None
    for (a, high), (b, low) in itertools.pairwise(points):
        if onset is None:
            if low <= level < high:
                onset = a + (b - a) * (high - level) / (high - low)
        elif high <= level < low:
            return onset, a + (b - a) * (level - high) / (low - high)
    return onset, None


def spread(values: Iterable[float], least: float = -math.inf) -> Spread | None:
    """Mean and 95 % t interval over draws; None of none. ``least``: what no value can be below."""
    found = list(values)
    if not found:
        return None
    centre, deviation = mean(found), sd(found)
    if deviation is None:
        return {"mean": centre, "low": None, "high": None, "n": 1}
    half = t_quantile(0.975, len(found) - 1) * deviation / math.sqrt(len(found))
    return {"mean": centre, "low": max(least, centre - half), "high": centre + half, "n": len(found)}


def along(curve: Row, loss: str) -> Points:
    """One loss of a curve, from the model outwards to the first value that is not finite."""
    return list(_finite(curve["points"], loss))


def _finite(rows: Sequence[Row], loss: str) -> Iterator[tuple[float, float]]:
    for row in rows:
        distance, value = finite(row.get("distance")), finite(row.get(loss))
        if distance is None or distance < 0.0:
            continue
        if value is None:
            return
        yield distance, value


def means(curves: Sequence[Row], loss: str, *, both: bool = False) -> list[tuple[float, float]]:
    """The mean over the draws of one direction, at the distances at which all of them are known.

    Args:
        curves: Of one direction.
        loss: Of :data:`immunity.measure.geometry.LOSSES`.
        both: Distances below 0, uphill, are taken, too.
    """
    found: dict[float, list[float]] = {}
    for curve in curves:
        for row in curve["points"]:
            distance, value = finite(row.get("distance")), finite(row.get(loss))
            if distance is not None and value is not None and (both or distance >= 0.0):
                found.setdefault(distance, []).append(value)
    return [(at, mean(values)) for at, values in sorted(found.items()) if len(values) == len(curves)]


def value_at(points: Points, at: float) -> float | None:
    """The value at a distance, on a straight line between the two points beside it; None beyond the last."""
    for (a, left), (b, right) in itertools.pairwise(points):
        if a <= at <= b:
            return left + (right - left) * (at - a) / (b - a)
    return None


def by_direction(found: Row) -> dict[str, list[Row]]:
    """Direction -> the curves of its draws, in the order in which the directions first appear."""
    curves: dict[str, list[Row]] = {}
    for curve in found.get("curves") or ():
        curves.setdefault(str(curve["direction"]), []).append(curve)
    return curves


def bottom(found: Row) -> float:
    """The nearest distance at which the harmful direction has done 95 % of its fall: directions are compared there.

    The last distance where nothing falls, and 0 where there is no harmful direction.
    """
    points = means(by_direction(found).get(HARMFUL, ()), "collapse")
    if not points:
        return 0.0
    first, lowest = points[0][1], min(value for _, value in points)
    if first <= lowest:
        return points[-1][0]
    return next(at for at, value in points if first - value >= _DONE * (first - lowest))


def summary(found: Row, at: float | None = None) -> dict[str, Any]:
    """What a probe found, in numbers over its draws.

    Args:
        found: Of :func:`immunity.measure.geometry.probed`, as plain data.
        at: Where directions are compared; by default :func:`bottom`. Give both models the hardened one's.

    Returns:
        * "level", "chance" and "at"; "home": the losses at the model.
        * "directions": a row each: "fired" of "n" draws came down to the level; "depth", and of those that did "onset",
          "width" and "inside" ("open": how many were not left again), and "rise" of the general loss at the most, all
          as spreads;
          "clear_until": the nearest onset, or "end", the greatest distance, where no draw fired; "there": mean losses
          at "at".
        * "numbers": norms, cosines and curvatures of gradients, as spreads.

    Raises:
        SettingsError: There are no curves with a finite ℓ_collapse.
    """
    curves = by_direction(found)
    home = next((curve for rows in curves.values() for curve in rows if along(curve, "collapse")), None)
    if home is None:
        raise SettingsError("a probe without a curve of the collapse loss has no geometry")
    level = level_of(along(home, "collapse")[0][1], float(found["chance"]))
    where = bottom(found) if at is None else at
    start = next(row for row in home["points"] if row["distance"] == 0.0)
    return {
        "level": level,
        "chance": found["chance"],
        "at": where,
        "home": {name: value for name, value in start.items() if name not in {"distance", "away"}},
        "directions": [_direction(name, rows, level, where) for name, rows in curves.items()],
        "numbers": _numbers(found.get("draws") or ()),
    }


def _direction(name: str, rows: Sequence[Row], level: float, at: float) -> dict[str, Any]:
    basins = [basin(points, level) for row in rows if (points := along(row, "collapse"))]
    fired = [one for one in basins if one.onset is not None]
    general = [points for row in rows if (points := along(row, "general"))]
    losses = sorted({key for row in rows for point in row["points"] for key in point} - {"distance", "away"})
    return {
        "direction": name,
        "n": len(basins),
        "fired": len(fired),
        "depth": spread((one.depth for one in basins), 0.0),
        "lowest": spread((one.lowest for one in basins), 0.0),
        "onset": spread((one.onset for one in fired if one.onset is not None), 0.0),
        "width": spread((one.width for one in fired if one.width is not None), 0.0),
        "inside": spread((one.inside for one in fired), 0.0),
        "open": sum(one.open for one in fired),
        "clear_until": min((one.onset for one in fired if one.onset is not None), default=None),
        "end": min((one.end for one in basins), default=0.0),
        "rise": spread((max(value for _, value in points) - points[0][1] for points in general), 0.0),
        "there": {loss: value_at(means(rows, loss), at) for loss in losses},
    }


def _numbers(draws: Sequence[Row]) -> dict[str, dict[str, Spread | None]]:
    """Kind -> name -> spread over the draws that have it."""
    found: dict[str, dict[str, Spread | None]] = {}
    for kind, least in (("norms", 0.0), ("cosines", -1.0), ("curvature", -math.inf)):
        names = dict.fromkeys(name for draw in draws for name in draw.get(kind) or {})
        known = {name: [finite((draw.get(kind) or {}).get(name)) for draw in draws] for name in names}
        found[kind] = {name: spread([v for v in row if v is not None], least) for name, row in known.items()}
    return found
