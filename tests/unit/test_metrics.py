"""Statistics, and curves as they are read from a result."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import DataError, SettingsError
from immunity.metrics.curves import asked, curve, curves, released
from immunity.metrics.stats import finite, mean, wilson


class TestStats:
    def test_wilson_is_wilsons(self) -> None:
        # 44 of 48 and 0 of 10, worked out by hand from the textbook formula with z = 1.959964.
        low, high = wilson(44 / 48, 48)
        assert (round(low, 4), round(high, 4)) == (0.8045, 0.9671)
        low, high = wilson(0.0, 10)
        assert (low, round(high, 4)) == (0.0, 0.2775)

    @pytest.mark.parametrize("bad", [(1.2, 10, 0.95), (-0.1, 10, 0.95), (0.5, 0, 0.95), (0.5, 10, 1.0)])
    def test_wilson_refuses_what_is_no_share(self, bad: tuple[float, int, float]) -> None:
        with pytest.raises(SettingsError):
            wilson(*bad)

    def test_only_finite_numbers_count(self) -> None:
        values = [1, 2.5, True, None, "3", math.nan, math.inf, -math.inf]
        assert [finite(value) for value in values] == [1.0, 2.5, None, None, None, None, None, None]

    def test_no_values_have_no_mean(self) -> None:
        with pytest.raises(SettingsError):
            mean([])

    @given(st.floats(0.0, 1.0), st.integers(1, 5000))
    def test_wilson_holds_the_share_and_stays_a_share(self, share: float, n: int) -> None:
        low, high = wilson(share, n)
        assert 0.0 <= low <= share <= high <= 1.0
        wider = wilson(share, n, level=0.99)
        assert wider.low <= low + 1e-12
        assert high <= wider.high + 1e-12
        mirrored = wilson(1.0 - share, n)
        assert math.isclose(mirrored.low, 1.0 - high, abs_tol=1e-9)

    @given(st.floats(0.0, 1.0), st.integers(1, 2000))
    def test_wilson_narrows_with_more_prompts(self, share: float, n: int) -> None:
        low, high = wilson(share, n)
        less_low, less_high = wilson(share, 2 * n)
        assert less_high - less_low < high - low

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.randoms())
    def test_the_mean_is_free_of_order_and_within_bounds(self, values: list[float], rng: Any) -> None:
        assert mean(rng.sample(values, len(values))) == mean(values)
        assert min(values) - 1e-6 <= mean(values) <= max(values) + 1e-6


class TestReading:
    row: ClassVar[dict[str, Any]] = {
        "defence": "d",
        "attack": "a",
        "seed": 3,
        "points": [{"step": 0, "metrics": {"harm": 0.5}}],
    }

    def test_what_is_not_finite_was_not_measured(self) -> None:
        points = [
            {"step": 2, "metrics": {"harm": math.nan, "collapse_loss": math.inf, "refusal": None, "perplexity": 3}}
        ]
        read = curve({**self.row, "points": points, "n_prompts": {"harm": 48, "benign": None}}, "mixed")
        assert (dict(read.points[0].metrics), dict(read.n_prompts)) == ({"perplexity": 3.0}, {"harm": 48})

    @pytest.mark.parametrize("step", [None, -1, 1.5, "3", True])
    def test_a_step_is_a_whole_number(self, step: object) -> None:
        with pytest.raises(DataError, match="step is"):
            curve({**self.row, "points": [{"step": step, "metrics": {}}]}, "harmful")

    def test_a_step_comes_once(self) -> None:
        with pytest.raises(DataError, match="twice"):
            curve({**self.row, "points": [{"step": 1}, {"step": 1}]}, "harmful")

    def test_percentages_are_refused_by_name(self) -> None:
        with pytest.raises(DataError, match="harm is 92"):
            curve({**self.row, "points": [{"step": 1, "metrics": {"harm": 92}}]}, "harmful")

    def test_an_unknown_threat_or_attack_is_named(self) -> None:
        with pytest.raises(DataError, match="unknown threat 'rude'"):
            curve(self.row, "rude")
        with pytest.raises(DataError, match="'a', which is not among"):
            curves({"attacks": [{"name": "b", "threat": "harmful"}], "curves": [self.row]})


class TestAsReleased:
    @staticmethod
    def read(*attacks: tuple[dict[str, Any], float], first: int = 0, fresh: str = "") -> Any:
        """Curves that begin with a harm each, under attacks with such settings."""
        rows = [
            {"defence": "d", "attack": str(i), "fresh": fresh, "points": [{"step": first, "metrics": {"harm": harm}}]}
            for i, (_, harm) in enumerate(attacks)
        ]
        settings = [
            {"name": str(i), "threat": "harmful", "settings": settings} for i, (settings, _) in enumerate(attacks)
        ]
        return curves({"attacks": settings, "curves": rows})

    def test_only_those_count_that_ask_plainly(self) -> None:
        prefill, opener = {"attack": "ask", "style": "prefill"}, {"attack": "finetune", "style": "opener"}
        program = {"attack": "program", "ops": ["finetune steps=3", "ask style=prefill", "finetune steps=5"]}
        read = self.read((prefill, 0.9), (opener, 0.8), (program, 0.7), ({"attack": "finetune", "style": "plain"}, 0.1))
        assert [one.asks for one in read] == ["prefill", "opener", "prefill", "plain"]
        assert (released(read), asked(read)) == ({"harm": 0.1}, "plain")

    def test_where_nobody_does_it_is_said(self) -> None:
        read = self.read(({"style": "prefill"}, 0.9), ({"style": "opener"}, 0.2), ({"style": "prefill"}, 0.8))
        assert (released(read), asked(read)) == ({"harm": 0.8}, "prefill, opener")

    def test_attacks_that_say_nothing_ask_plainly(self) -> None:
        read = self.read(({}, 0.3), ({"attack": "prune"}, 0.2))
        assert (released(read), asked(read)) == ({"harm": 0.2}, "plain")

    def test_what_was_not_measured_as_released_is_not_it(self) -> None:
        for read in (self.read(({}, 0.3), first=2), self.read(({}, 0.3), fresh="artefact"), ()):
            assert (released(read), asked(read)) == ({}, "")
