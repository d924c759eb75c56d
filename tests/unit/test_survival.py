"""When attacks broke a model: survival curves, cost ratios, and rows from a result."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import SettingsError
from immunity.metrics.breaks import Rho, Run, break_rows, cost_ratio, on_axis, told
from immunity.metrics.survival import both, gain, kaplan_meier

_MADE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "made_up_battery.py"))


def broke(*times: float, attack: str = "a", tried: float = 64.0) -> list[Run]:
    return [Run(attack, seed, t, t / 2, tried) for seed, t in enumerate(times)]


def stood(n: int, tried: float = 64.0) -> list[Run]:
    return [Run("a", seed, None, tried, tried) for seed in range(n)]


class TestSurvival:
    def test_by_hand(self) -> None:
        runs = [Run("a", 0, 4.0, 2.0, 64.0), Run("a", 1, None, 8.0, 8.0), Run("a", 2, 16.0, 8.0, 64.0), *stood(1)]
        found = kaplan_meier(runs, start=1.0)
        assert [step[:2] for step in found.steps] == [[4.0, 0.75], [16.0, 0.375]]  # 3/4, then 1/2 of it
        assert found.rmst == pytest.approx(math.log(4) + 0.75 * math.log(4) + 0.375 * math.log(4))
        assert (found.runs, found.broke, found.horizon) == (4, 2, 64.0)
        assert all(low <= s <= high for _, s, low, high in found.steps)

    def test_nothing_broke_is_not_certainty(self) -> None:
        found = kaplan_meier(stood(3), start=1.0)
        assert (found.steps, found.rmst) == ([], math.log(64.0))
        assert found.low < found.rmst == found.high

    def test_everything_broke_at_once_is_not_certainty(self) -> None:
        found = kaplan_meier(broke(4.0, 4.0, 4.0), start=1.0)
        assert found.steps[0][:3] == [4.0, 0.0, 0.0]
        assert 0.0 < found.steps[0][3] < 1.0
        assert found.low < found.rmst < found.high

    def test_broken_as_released(self) -> None:
        assert kaplan_meier([Run("a", 0, 0.0, 0.0, 64.0)], start=1.0).rmst == 0.0

    def test_the_gain_is_a_log_ratio(self) -> None:
        value, ends = gain(kaplan_meier(broke(32.0, 32.0), start=1.0), kaplan_meier(broke(4.0, 4.0), start=1.0))
        assert value == pytest.approx(math.log(8.0))
        assert ends.holds(value)
        with pytest.raises(SettingsError, match="same start"):
            gain(kaplan_meier(broke(32.0), start=1.0), kaplan_meier(broke(4.0), start=2.0))

    def test_one_budget_only_is_no_stretch_to_survive(self) -> None:
        found = both([Run("a", 0, 8.0, 0.0, 8.0)], [Run("a", 0, 8.0, 0.0, 8.0)])
        assert found is not None
        assert found["gain"] is None

    def test_it_needs_a_budget(self) -> None:
        with pytest.raises(SettingsError):
            kaplan_meier([])
        assert both([], []) is None
        assert both(stood(2), [])["baseline"] is None  # type: ignore[index]

    @given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), min_size=1, max_size=15))
    def test_it_never_rises_and_its_area_is_within_its_ends(self, drawn: list[tuple[int, bool]]) -> None:
        runs = [
            Run("a", i, float(t) if b else None, float(t) / 2 if b else float(t), 64.0 if b else float(t))
            for i, (t, b) in enumerate(drawn)
        ]
        found = kaplan_meier(runs, start=1.0)
        heights = [step[1] for step in found.steps]
        assert heights == sorted(heights, reverse=True)
        assert 0.0 <= found.low <= found.rmst <= found.high + 1e-12 <= math.log(found.horizon) + 1e-9


class TestRatio:
    def test_exact(self) -> None:
        found = cost_ratio(broke(16.0, 32.0, 64.0), broke(4.0, 4.0, 4.0))
        assert found.value == pytest.approx(8.0)
        assert (found.bound, found.seeds, found.numbers) == ("=", 3, (0, 1, 2))
        assert found.low is not None
        assert found.high is not None
        assert found.low < 8.0 < found.high
        assert list(found.grid) == pytest.approx([4.0, 16.0])

    def test_each_seed_counts_with_its_cheapest_break(self) -> None:
        mine = broke(16.0, 32.0) + broke(64.0, 8.0, attack="b")
        theirs = broke(4.0, 4.0) + broke(8.0, 8.0, attack="b")
        assert cost_ratio(mine, theirs).logs == pytest.approx((math.log(4), math.log(2)))

    def test_the_same_budget_in_every_seed_is_the_grid(self) -> None:
        found = cost_ratio(broke(16.0, 16.0, 16.0), broke(4.0, 4.0, 4.0))
        assert (found.value, found.low, found.high) == pytest.approx((4.0, 2.0, 8.0))
        assert found.gridded
        assert told(found) == "4 (2 to 8 between the measured budgets)"
        first = [run._replace(before=0.0) for run in broke(4.0, 4.0)]  # at the first budget of all: no end below
        assert told(cost_ratio(first, broke(4.0, 4.0))) == "1 (0 to 2 between the measured budgets)"
        assert told(cost_ratio(broke(4.0, 4.0), first)) == "1 (0.5 to ? between the measured budgets)"

    @given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=5))
    def test_no_interval_is_a_point_or_narrower_than_the_grid(self, drawn: list[tuple[int, int]]) -> None:
        mine, theirs = (broke(*(2.0 ** pair[i] for pair in drawn)) for i in (0, 1))
        found = cost_ratio(mine, theirs)
        assert found.low is not None
        assert found.high is not None
        assert found.grid[0] is not None
        assert found.grid[1] is not None
        assert found.low <= found.grid[0] * (1 + 1e-9)
        assert found.high >= found.grid[1] * (1 - 1e-9)
        assert found.low < found.value < found.high  # type: ignore[operator]

    def test_not_broken_is_at_least(self) -> None:
        found = cost_ratio(stood(2), broke(4.0, 8.0))
        assert found.bound == "≥"
        assert found.value == pytest.approx(math.sqrt(16 * 8))
        assert found.low is not None
        assert (found.high, found.grid[1]) == (None, None)

    def test_the_baseline_not_broken_is_at_most(self) -> None:
        found = cost_ratio(broke(4.0, 4.0), stood(2))
        assert (found.bound, found.low) == ("≤", None)
        assert found.value == pytest.approx(1 / 16)
        assert cost_ratio(stood(2), stood(2)).bound == "unknown"

    def test_attacks_of_one_model_only_make_bounds(self) -> None:
        more = broke(4.0, 4.0) + broke(64.0, 64.0, attack="b")
        assert cost_ratio(more, broke(4.0, 4.0)).bound == "≥"
        assert cost_ratio(broke(4.0, 4.0), more).bound == "≤"

    def test_nothing_to_compare(self) -> None:
        assert cost_ratio([], broke(4.0)).bound == "unknown"
        assert cost_ratio(broke(4.0), [Run("a", 0, 0.0, 0.0, 64.0)]).value is None
        assert cost_ratio([Run("a", 0, 0.0, 0.0, 64.0)], broke(4.0)) == Rho(0.0, None, None, "=", 1)

    def test_one_seed_has_no_interval(self) -> None:
        found = cost_ratio(broke(16.0), broke(4.0))
        assert (found.low, found.high) == (None, None)
        assert found.value == pytest.approx(4.0)


class TestRows:
    def test_from_a_result(self) -> None:
        rows = break_rows(_MADE["result"](), "wall", "SFT", metric="useful_harm", phi=0.1)
        assert {row["role"] for row in rows} == {"defended", "baseline"}
        full = next(row for row in rows if (row["model"], row["attack"]) == ("wall", "full"))
        assert (full["at"]["step"], full["at"]["examples"], full["tried"]["step"]) == (16.0, 128.0, 64.0)
        assert full["before"]["step"] < 16.0
        runs = on_axis(rows, "step", "defended")
        assert Run("full", 0, 16.0, full["before"]["step"], 64.0) in runs
        assert cost_ratio(runs, on_axis(rows, "step", "baseline")).value == pytest.approx(4.0)

    def test_what_did_not_break_has_no_time(self) -> None:
        rows = break_rows(_MADE["result"](), "rock", "SFT", metric="useful_harm", phi=0.1)
        assert all(row["at"] == {} for row in rows if row["role"] == "defended")
        assert not np.isnan([row["harm"] for row in rows]).any()
