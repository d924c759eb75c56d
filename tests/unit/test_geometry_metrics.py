"""Onset, width and depth of basins, read off made-up curves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import SettingsError
from immunity.metrics.geometry import LEFT, along, basin, bottom, level_of, means, spread, summary, value_at
from immunity.metrics.stats import t_quantile

LEVEL = 5.0


@st.composite
def curves(draw: st.DrawFn) -> list[tuple[float, float]]:
    gaps = draw(st.lists(st.integers(1, 40), min_size=0, max_size=8))
    at, points = 0, [(0.0, draw(st.integers(0, 200)) / 10.0)]
    for gap in gaps:
        at += gap
        points.append((at / 20.0, draw(st.integers(0, 200)) / 10.0))
    return points


def line(points: list[tuple[float, float]], x: float) -> float:
    for (a, left), (b, right) in itertools.pairwise(points):
        if a <= x <= b:
            return left + (right - left) * (x - a) / (b - a)
    return points[0][1]


@given(curves())
def test_a_basin_agrees_with_looking_at_many_places(points: list[tuple[float, float]]) -> None:
    found, end = basin(points, LEVEL), points[-1][0]
    n = 20_000
    places = [end * i / n for i in range(n + 1)] if end else [0.0]
    below = [line(points, x) <= LEVEL for x in places]
    step = end / n
    if found.onset is None:
        assert not any(below)
        assert found.width is None
        assert not found.open
    else:
        first = below.index(True) if True in below else None
        if first is None:  # it only touches the level between two places
            assert found.width == pytest.approx(0.0, abs=3 * step)
        else:
            assert found.onset == pytest.approx(places[first], abs=2 * step + 1e-9)
            rest = below[first:]
            width = (rest.index(False) if False in rest else len(rest) - 1) * step
            assert found.width == pytest.approx(width, abs=3 * step + 1e-9)
            assert found.open == (False not in rest)
    assert found.inside == pytest.approx(step * sum(below[1:]), abs=20 * step + 1e-9)
    assert (found.width or 0.0) <= found.inside + 1e-9 <= end + 2e-9
    assert found.depth == pytest.approx(points[0][1] - min(y for _, y in points))
    assert found.lowest == min(y for _, y in points)
    assert found.end == end


@given(curves(), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_a_basin_scales_with_both_axes(points: list[tuple[float, float]], far: float, high: float) -> None:
    one = basin(points, LEVEL)
    other = basin([(far * x, high * y) for x, y in points], high * LEVEL)
    for a, b in ((one.onset, other.onset), (one.width, other.width), (one.inside, other.inside)):
        if a is None or b is None:
            # Rounding may part a point that lies on the level from it.
            assert a is b or LEVEL in {y for _, y in points}
        elif LEVEL not in {y for _, y in points}:
            assert b == pytest.approx(far * a, rel=1e-6, abs=1e-9)
    assert other.depth == pytest.approx(high * one.depth, abs=1e-9)


def test_made_up_basins() -> None:
    v = basin([(0.0, 10.0), (1.0, 0.0), (2.0, 10.0), (3.0, 0.0)], LEVEL)
    assert (v.onset, v.width, v.open, v.depth, v.at) == (0.5, 1.0, False, 10.0, 1.0)
    assert v.inside == pytest.approx(1.5)
    fallen = basin([(0.0, 4.0), (1.0, 3.0)], LEVEL)
    assert (fallen.onset, fallen.width, fallen.open) == (0.0, 1.0, True)
    flat = basin([(0.0, 10.0), (5.0, 12.0)], LEVEL)
    assert (flat.onset, flat.width, flat.depth, flat.end, flat.inside) == (None, None, 0.0, 5.0, 0.0)
    for bad in ([], [(1.0, 2.0), (1.0, 3.0)], [(1.0, 2.0), (0.5, 3.0)]):
        with pytest.raises(SettingsError):
            basin(bad, LEVEL)


def test_a_model_that_forgot_everything_has_not_fallen_into_a_basin() -> None:
    chance = math.log(400)
    assert level_of(21.0, chance) == LEFT * chance < chance, "half of 21 is more than a model that knows nothing has"
    assert level_of(4.0, chance) == 2.0
    for left in (0.0, 1.0):
        with pytest.raises(SettingsError):
            level_of(1.0, 1.0, left)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_spreads_are_t_intervals(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    n = len(values)
    centre = sum(values) / n
    half = t_quantile(0.975, n - 1) * math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)
    assert found["mean"] == pytest.approx(centre, abs=1e-9)
    assert found["high"] == pytest.approx(centre + half, rel=1e-6, abs=1e-6)
    assert found["n"] == n
    least = spread([abs(v) for v in values], 0.0)
    assert least is not None
    assert least["low"] is not None
    assert 0.0 <= least["low"] <= least["mean"] + 1e-9


def test_few_values_have_few_ends() -> None:
    assert spread([]) is None
    assert spread([2.0]) == {"mean": 2.0, "low": None, "high": None, "n": 1}


def curve(name: str, *values: float | None, draw: int = 0, general: float = 0.1) -> dict[str, Any]:
    points = [{"distance": i / 2, "collapse": value, "general": general + i} for i, value in enumerate(values)]
    return {"direction": name, "draw": draw, "points": points}


def found(**more: Any) -> dict[str, Any]:
    made = {
        "word": "error",
        "chance": 8.0,
        "curves": [
            curve("harmful", 10.0, 0.2, 0.0),
            curve("benign", 10.0, 10.0, 3.0),
            curve("random", 10.0, 9.0, 9.5),
            curve("harmful", 10.0, 1.0, 0.1, draw=1),
            curve("benign", 10.0, 9.0, 6.0, draw=1),
            curve("random", 10.0, 10.5, 9.8, draw=1),
        ],
        "draws": [
            {"norms": {"harmful": 2.0}, "cosines": {"harmful benign": 0.5}, "curvature": {"harmful": 3.0}},
            {"norms": {"harmful": 4.0}, "cosines": {}, "curvature": {"harmful": None}},
        ],
    }
    return {**made, **more}


def test_the_summary_of_made_up_curves() -> None:
    told = summary(found())
    assert (told["level"], told["at"], told["home"]) == (4.0, 1.0, {"collapse": 10.0, "general": 0.1})
    harmful, benign, random = told["directions"]
    assert (harmful["fired"], harmful["n"], harmful["open"]) == (2, 2, 2)
    assert harmful["onset"]["mean"] == pytest.approx((0.5 * 6 / 9.8 + 0.5 * 6 / 9) / 2)
    assert harmful["clear_until"] == pytest.approx(0.5 * 6 / 9.8)
    assert (benign["fired"], benign["onset"]["n"], benign["onset"]["low"]) == (1, 1, None)
    assert (random["fired"], random["onset"], random["width"], random["clear_until"]) == (0, None, None, None)
    assert random["depth"]["mean"] == pytest.approx(0.6)
    assert random["end"] == 1.0
    assert benign["there"] == {"collapse": 4.5, "general": 2.1}
    assert harmful["rise"]["mean"] == pytest.approx(2.0)
    assert told["numbers"]["norms"]["harmful"]["mean"] == 3.0
    assert told["numbers"]["cosines"]["harmful benign"]["n"] == 1
    assert told["numbers"]["curvature"]["harmful"] == {"mean": 3.0, "low": None, "high": None, "n": 1}


def test_directions_are_compared_where_the_harmful_one_has_fallen() -> None:
    assert bottom(found()) == 1.0  # at 0.5 the mean has done 94 % of its fall
    assert bottom({"curves": [curve("harmful", 10.0, 0.2, 0.0)]}) == 0.5
    assert bottom({"curves": [curve("harmful", 10.0, 11.0, 12.0)]}) == 1.0, "nothing falls"
    assert bottom({"curves": [curve("random", 1.0, 0.0)]}) == 0.0
    assert summary(found(), at=0.25)["directions"][1]["there"]["collapse"] == pytest.approx(9.75)


def test_a_curve_ends_where_it_is_not_finite() -> None:
    cut = curve("harmful", 10.0, 8.0, None, 1.0)
    assert along(cut, "collapse") == [(0.0, 10.0), (0.5, 8.0)]
    assert means([cut, curve("harmful", 10.0, 4.0, 2.0, 2.0)], "collapse") == [(0.0, 10.0), (0.5, 6.0), (1.5, 1.5)]
    assert along(curve("harmful", math.nan), "collapse") == []
    with pytest.raises(SettingsError, match="no geometry"):
        summary(found(curves=[curve("harmful", None)]))


def test_values_between_and_beyond() -> None:
    points = [(0.0, 1.0), (2.0, 3.0)]
    assert (value_at(points, 0.0), value_at(points, 1.0), value_at(points, 2.0)) == (1.0, 2.0, 3.0)
    assert value_at(points, 2.1) is None
