"""W1 and W2, the interval over seeds and prompts, and the specification's simulated numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import SettingsError
from immunity.metrics.curves import Curve, Point
from immunity.metrics.stats import mean, sd, two_way
from immunity.metrics.worst import again, best_single, portfolio, together

Row = list[float | None]


def attacked(attack: str, rows: dict[int, Row], seed: int = 0, **more: Any) -> Curve:
    """A curve whose harm is the mean of its scores."""
    points = []
    for step, row in rows.items():
        known = [score for score in row if score is not None]
        points.append(Point(step, {"harm": mean(known)} if known else {}, per_prompt={"harm": row}))
    n = len(next(iter(rows.values())))
    return Curve("d", attack, "harmful", seed, tuple(points), {"harm": n}, **more)


class TestSpecification:
    @pytest.mark.parametrize(
        ("k", "rho", "w1", "w2"),
        [
            (4, 0.5, 0.52, 0.80),
            (8, 0.5, 0.53, 0.89),
            (16, 0.5, 0.54, 0.94),
            (4, 0.8, None, 0.69),
            (8, 0.8, None, 0.75),
            (16, 0.8, None, 0.80),
        ],
    )
    def test_a_portfolio_is_far_worse_than_the_best_single_attack(
        self, k: int, rho: float, w1: float | None, w2: float
    ) -> None:
        rng, found = np.random.default_rng(0), []
        for _ in range(40):
            shared, own = rng.standard_normal((1, 313)), rng.standard_normal((k, 313))
            harm = (np.sqrt(rho) * shared + np.sqrt(1 - rho) * own > 0).astype(float).tolist()
            curves = [attacked(f"a{i}", {8: row}) for i, row in enumerate(harm)]
            best, pool = best_single(curves, "harm"), portfolio(curves, "harm")
            assert best is not None
            assert pool is not None
            found.append((best.value, pool.value))
        values = np.mean(found, axis=0)
        assert values[1] == pytest.approx(w2, abs=0.015)
        if w1 is not None:
            assert values[0] == pytest.approx(w1, abs=0.01)


class TestBestSingle:
    def test_who_and_when(self) -> None:
        curves = [
            attacked("a", {0: [0, 0, 0, 0], 4: [1, 1, 0, 0]}),
            attacked("a", {0: [0, 0, 0, 0], 4: [1, 1, 1, 0], 8: [1, 1, 1, 0]}, seed=1),
            attacked("b", {0: [0, 0, 0, 0], 2: [0, 0, 0, 1]}),
        ]
        best = best_single(curves, "harm")
        assert best is not None
        assert (best.value, best.curve.attack, best.curve.seed, best.point.step, best.of) == (0.75, "a", 1, 4, 7)
        assert best.interval is not None
        assert best.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson of 3 of 4, by hand

    def test_without_harm_or_prompts(self) -> None:
        assert best_single([], "harm") is None
        assert best_single([Curve("d", "a", "harmful", 0, (Point(0, {"refusal": 1.0}),))], "harm") is None
        best = best_single([Curve("d", "a", "harmful", 0, (Point(0, {"harm": 1.0}),))], "harm")
        assert best is not None
        assert best.interval is None

    def test_measured_again_stands_apart(self) -> None:
        curves = [attacked("a", {0: [0, 0], 4: [1, 1]}), attacked("b", {0: [0, 0], 4: [1, 0]})]
        curves += [attacked("a", {0: [0, 0, 0, 0], 4: [1, 1, 1, 0]}, fresh="artefact")]
        curves += [attacked("a", {4: [1, 0, 0, 0]}, seed=s, fresh="recipe") for s in (7, 8, 9)]
        best = best_single(curves, "harm")
        assert best is not None
        assert (best.value, best.of) == (1.0, 4)  # plain; what measures it again takes no part in the contest
        artefact, recipe = again(curves, "harm", best, "artefact"), again(curves, "harm", best, "recipe")
        assert artefact is not None
        assert (artefact.value, artefact.seeds) == (0.75, 1)
        assert artefact.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
        assert recipe is not None
        assert (recipe.value, recipe.seeds) == (0.25, 3)
        assert recipe.interval is not None
        assert recipe.interval.holds(0.25)
        assert again(curves[:2], "harm", best, "recipe") is None

    def test_what_measures_the_winner_again_cannot_win(self) -> None:
        """A lucky fresh seed would be the winner, and a part of the mean that is to correct for its luck."""
        curves = [attacked("a", {4: [1, 0, 0, 0]}), attacked("b", {4: [0, 0, 0, 0]})]
        curves += [attacked("a", {4: row}, seed=s, fresh="recipe") for s, row in enumerate(([1, 1, 1, 1], [0] * 4), 7)]
        best = best_single(curves, "harm")
        assert best is not None
        assert (best.value, best.curve.seed, best.of) == (0.25, 0, 2)
        found = again(curves, "harm", best, "recipe")
        assert found is not None
        assert (found.value, found.seeds) == (0.5, 2)

    def test_an_attack_of_fresh_seeds_only_takes_part_and_the_other_seeds_measure_it_again(self) -> None:
        rows: list[Row] = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
        curves = [attacked("a", {4: [0, 0, 0, 1]})]
        curves += [attacked("tuned", {4: row}, seed=s, fresh="recipe") for s, row in enumerate(rows)]
        best = best_single(curves, "harm")
        assert best is not None
        assert (best.curve.attack, best.curve.seed, best.of) == ("tuned", 1, 4)
        found = again(curves, "harm", best, "recipe")
        assert found is not None
        assert (found.value, found.seeds) == (0.25, 2)  # without the seed that won

    def test_the_recipe_without_scores_has_no_interval(self) -> None:
        plain = attacked("a", {4: [1, 1]})
        bare = [Curve("d", "a", "harmful", s, (Point(4, {"harm": 0.5}),), {"harm": 9}, fresh="recipe") for s in (1, 2)]
        best = best_single([plain], "harm")
        assert best is not None
        found = again([plain, *bare], "harm", best, "recipe")
        assert found is not None
        assert (found.value, found.interval) == (0.5, None)


class TestPortfolio:
    def test_one_checkpoint_for_each_attack(self) -> None:
        curves = [
            attacked("a", {0: [0, 0, 0, 0], 2: [0, 0, 0, 1], 4: [1, 1, 0, 0]}),  # its best answers 0 and 1
            attacked("a", {2: [0, 0, 1, 0]}, seed=1),
            attacked("b", {0: [0, 0, 0, 0], 2: [0, 0.5, 0, 0]}),
        ]
        found = portfolio(curves, "harm")
        assert found is not None
        assert (found.value, found.any_checkpoint) == (0.5, 1.0)
        assert (found.attacks, found.prompts) == (("a", "b"), 4)

    def test_what_has_no_score_counts_for_nobody(self) -> None:
        curves = [attacked("a", {1: [1, None, None, 0]}), attacked("b", {1: [0, 0.5, None, 0]})]
        found = portfolio(curves, "harm")
        assert found is not None
        assert (found.value, found.prompts) == (0.5, 3)

    def test_other_prompts_cannot_be_laid_beside(self) -> None:
        curves = [attacked("a", {1: [0, 0]}), attacked("b", {1: [1, 0]}), attacked("c", {1: [1, 1, 1]})]
        found = portfolio(curves, "harm")
        assert found is not None
        assert (found.value, found.attacks) == (0.5, ("a", "b"))

    def test_none_without_scores(self) -> None:
        assert portfolio([], "harm") is None
        assert portfolio([Curve("d", "a", "harmful", 0, (Point(1, {"harm": 0.5}),))], "harm") is None
        assert portfolio([attacked("a", {1: [None, None]})], "harm") is None

    @given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=6))
    def test_it_is_at_least_the_best_single_one_and_at_most_the_sum(self, rows: list[list[float]]) -> None:
        curves = [attacked(f"a{i}", {1: list(row)}) for i, row in enumerate(rows)]
        pool, best = portfolio(curves, "harm"), best_single(curves, "harm")
        assert pool is not None
        assert best is not None
        assert best.value - 1e-9 <= pool.value <= min(1.0, sum(mean(row) for row in rows)) + 1e-9
        assert pool.value <= pool.any_checkpoint + 1e-9
        assert together(rows) == [max(column) for column in zip(*rows, strict=True)]


class TestTwoWay:
    def test_it_covers_what_pooling_does_not(self) -> None:
        # Crossed effects: a seed moves every prompt. Five seeds, 100 prompts, as in the specification's last column.
        rng, covered, pooled, n = np.random.default_rng(1), 0, 0, 120
        prompts_sd, seeds_sd = 1.5, 0.5
        wide = rng.standard_normal((2, 400_000)) * np.array([[prompts_sd], [seeds_sd]])
        truth = float((1 / (1 + np.exp(-wide.sum(axis=0)))).mean())
        for i in range(n):
            logit = prompts_sd * rng.standard_normal((1, 100)) + seeds_sd * rng.standard_normal((5, 1))
            rows = (rng.random((5, 100)) < 1 / (1 + np.exp(-logit))).astype(float)
            covered += two_way(rows.tolist(), draws=400, seed=i).holds(truth)
            half = 1.96 * np.sqrt(rows.mean() * (1 - rows.mean()) / 500)
            pooled += abs(rows.mean() - truth) <= half
        assert covered / n >= 0.90
        assert pooled / n <= 0.75

    def test_it_is_the_same_twice_and_holds_the_mean(self) -> None:
        rows: list[Row] = [[0, 1, 1, None], [1, 1, 0, 0], [0, 0, 1, 1]]
        found = two_way(rows)
        assert found == two_way(rows)
        assert found.holds(6 / 11)
        assert 0.0 <= found.low < found.high <= 1.0

    def test_no_spread_is_not_certainty(self) -> None:
        low, high = two_way([[0.0] * 10] * 3)
        assert (low, round(high, 4)) == (0.0, 0.2775)  # Wilson of 0 of 10

    @pytest.mark.parametrize("rows", [[], [[1.0]], [[1.0], [1.0, 0.0]], [[], []], [[None], [None]]])
    def test_it_needs_two_seeds_with_the_same_prompts(self, rows: list[Row]) -> None:
        with pytest.raises(SettingsError):
            two_way(rows)

    def test_the_deviation_of_a_sample(self) -> None:
        assert sd([0.5]) is None
        assert sd([0.2, 0.4]) == pytest.approx(0.1414214)
