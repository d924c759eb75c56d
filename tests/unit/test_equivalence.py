"""Two models on the same prompts, and many tests at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import SettingsError
from immunity.metrics.equivalence import difference, tost
from immunity.metrics.multiple import benjamini_hochberg, holm
from immunity.metrics.stats import rate, two_way, two_way_t, wilson

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


class TestDifference:
    def test_the_same_answers_are_not_proof_of_equality(self) -> None:
        found = difference([[1.0] * 100], [[1.0] * 100])
        low, high = found.interval(0.90)
        assert found.value == 0.0
        assert low == pytest.approx(-high)
        assert high == pytest.approx(1.6598 * math.sqrt(4 / 103 / 104), rel=1e-3)  # four made-up prompts in 104
        assert not tost([[1.0] * 100], [[1.0] * 100]).equivalent
        assert tost([[1.0] * 200], [[1.0] * 200]).equivalent

    def test_rates_are_never_more_than_1_apart(self) -> None:
        none, most = [[0.0] * 24], [[1.0] * 23 + [0.0]]
        assert difference(none, most, share=False).interval(0.9999).low < -1.0
        assert difference(none, [[1.0] * 24]).interval().low == -1.0
        assert difference([[1.0] * 24], none).interval().high == 1.0
        assert difference(none, most).interval().low > -1.0

    def test_one_seed_stands_beside_each_of_several(self) -> None:
        several = [[1.0, 0.0, 1.0, 1.0]] * 3
        found = difference(several, [[1.0, 1.0, 1.0, 1.0]])
        assert found.interval() == difference(several, [[1.0] * 4] * 3).interval()
        assert (found.seeds, found.n) == (3, 4)

    def test_missing_scores_are_bounded_not_guessed(self) -> None:
        full, gaps = [[1.0] * 100], [[1.0] * 95 + [None] * 5]
        found = difference(gaps, full)
        assert (found.value, found.unscored) == (0.0, 5)
        assert found.interval(0.90).low < -0.05
        assert found.interval(0.90).high == pytest.approx(difference(full, full).interval(0.90).high)
        assert difference([[2.0, None, 3.0]], [[2.0, 1.0, 3.0]], share=False).n == 2

    def test_p_values_agree_with_the_interval(self) -> None:
        worse, base = [[0.0] * 10 + [1.0] * 90], [[1.0] * 100]
        found = tost(worse, base)
        assert found.p_less < 0.05 < found.p
        assert found.high < -found.delta
        assert found.p_more > 0.99

    def test_the_least_effect_falls_with_prompts(self) -> None:
        assert difference([[1.0] * 400], [[1.0] * 400]).mde < difference([[1.0] * 100], [[1.0] * 100]).mde

    @pytest.mark.parametrize(
        ("model", "baseline"),
        [
            ([[1.0]], [[1.0, 0.0]]),
            ([[1.0]] * 3, [[1.0]] * 2),
            ([[None]], [[1.0]]),
            ([[1.0, None]], [[None, 1.0]]),
            ([[50.0]], [[60.0]]),
        ],
    )
    def test_what_does_not_match(self, model: list[list[float | None]], baseline: list[list[float | None]]) -> None:
        with pytest.raises(SettingsError):
            difference(model, baseline)

    def test_nothing_is_equal_to_within_nothing(self) -> None:
        with pytest.raises(SettingsError, match="delta"):
            tost([[1.0]], [[1.0]], delta=0.0)

    @given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, None]), st.sampled_from([0.0, 1.0])), min_size=3, max_size=30))
    def test_swapping_the_models_mirrors_it(self, pairs: list[tuple[float | None, float]]) -> None:
        first, second = [[a for a, _ in pairs]], [[b for _, b in pairs]]
        if all(a is None for a, _ in pairs):
            return
        low, high = difference(first, second).interval()
        mirrored = difference(second, first).interval()
        assert mirrored.low == pytest.approx(-high)
        assert mirrored.high == pytest.approx(-low)
        assert low <= difference(first, second).value <= high


class TestRate:
    def test_which_interval(self) -> None:
        row = [1.0, 0.0, 1.0, None]
        assert rate([row]) == wilson(2 / 3, 3)
        assert rate([row, row[::-1]]) == two_way_t([row, row[::-1]])
        assert rate([row] * 2 + [row[::-1]] * 2) == two_way([row] * 2 + [row[::-1]] * 2)

    def test_no_spread_is_not_certainty(self) -> None:
        assert two_way_t([[0.0] * 10] * 3) == wilson(0.0, 10)

    def test_rows_and_columns_of_one_mean_are_no_certainty_either(self) -> None:
        low, high = rate([[0.0, 1.0] * 10, [1.0, 0.0] * 10])
        assert low < 0.5 < high
        gaps = difference([[0.1, -0.1], [-0.1, 0.1]], [[0.0, 0.0]], share=False).interval()
        assert gaps.low < -0.01 < 0.01 < gaps.high

    @given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5))
    def test_it_is_never_a_point(self, rows: list[list[float]]) -> None:
        low, high = rate(rows)
        assert low < high


class TestMany:
    def test_holm_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([]) == benjamini_hochberg([]) == []

    def test_benjamini_hochberg_by_hand(self) -> None:
        assert benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])

    @given(P_VALUES)
    def test_they_only_raise_and_keep_the_order(self, ps: list[float]) -> None:
        family, rate_ = holm(ps), benjamini_hochberg(ps)
        for i, p in enumerate(ps):
            assert p - 1e-12 <= rate_[i] <= family[i] + 1e-12 <= 1.0 + 2e-12
        assert sorted(range(len(ps)), key=lambda i: (ps[i], i)) == sorted(
            range(len(ps)), key=lambda i: (family[i], ps[i], i)
        )

    @pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
    def test_p_values_are_shares(self, correct: object) -> None:
        assert callable(correct)
        with pytest.raises(SettingsError):
            correct([1.5])
