"""Every interval holds the truth as often as it says, on noise that is made as the noise of an evaluation is.

Crossed effects: a prompt has a difficulty (logit SD 1.5), a seed moves a whole model, an answer is a coin toss.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from immunity.metrics.agreement import agreement, bounds
from immunity.metrics.breaks import Run, cost_ratio
from immunity.metrics.equivalence import against, difference, tost
from immunity.metrics.power import least_delta, mde, winners_curse
from immunity.metrics.quotients import fieller
from immunity.metrics.stability import divergence
from immunity.metrics.stats import FEW, rate, t_quantile, two_way, two_way_t, wilson
from immunity.metrics.survival import gain, kaplan_meier

Array = NDArray[np.float64]
PROMPTS, PROMPT_SD = 100, 1.5


def chance(logit: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-logit))


def crossed(rng: np.random.Generator, trials: int, seeds: int, seed_sd: float, shift: float = 0.0) -> Array:
    """[trials, S, n] answers, with truth one half where ``shift`` is 0."""
    prompt = PROMPT_SD * rng.standard_normal((trials, 1, PROMPTS))
    return toss(rng, shift + prompt + seed_sd * rng.standard_normal((trials, seeds, 1)))


def toss(rng: np.random.Generator, logit: Array) -> Array:
    return (rng.random(logit.shape) < chance(logit)).astype(np.float64)


def pooled(tables: Array) -> float:
    """How often Wilson's interval on seeds × prompts holds one half."""
    n = tables[0].size
    return float(np.mean([wilson(float(table.mean()), n).holds(0.5) for table in tables]))


class TestRates:
    @pytest.mark.parametrize(
        ("seeds", "seed_sd", "published"),  # evaluation of 3, 5 and 10 seeds × 100 prompts: Wilson on the pool
        [(3, 0.0, 0.91), (3, 0.5, 0.61), (5, 0.2, 0.74), (5, 0.5, 0.62), (10, 0.0, 0.69), (10, 0.5, 0.55)],
    )
    def test_pooling_fails_where_two_way_holds(self, seeds: int, seed_sd: float, published: float) -> None:
        rng = np.random.default_rng(seeds)
        assert pooled(crossed(rng, 1500, seeds, seed_sd)) == pytest.approx(published, abs=0.045)
        tables = crossed(rng, 250, seeds, seed_sd)
        found = np.mean([two_way(t.tolist(), draws=250, seed=i).holds(0.5) for i, t in enumerate(tables)])
        assert found >= (0.90 if seeds > 3 else 0.87)  # the table has 0.91 to 0.99; three seeds are where it is weak
        assert np.mean([two_way_t(t.tolist()).holds(0.5) for t in tables]) >= 0.95

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_the_default_holds_at_any_number_of_seeds(self, seeds: int) -> None:
        tables = crossed(np.random.default_rng(seeds), 200, seeds, 0.5)
        found = [rate(t.tolist()) if seeds <= FEW else two_way(t.tolist(), draws=300) for t in tables]
        assert np.mean([one.holds(0.5) for one in found]) >= 0.90

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
    def test_one_seed_is_wilsons(self, share: float) -> None:
        tables = (np.random.default_rng(1).random((2000, 1, PROMPTS)) < share).astype(float)
        assert np.mean([rate(t.tolist()).holds(share) for t in tables]) >= 0.93

    def test_rare_events(self) -> None:
        rng = np.random.default_rng(2)
        truth = float(chance(-4.0 + math.hypot(PROMPT_SD, 0.2) * rng.standard_normal(400_000)).mean())
        for seeds in (3, 5):
            tables = crossed(rng, 250, seeds, 0.2, -4.0)
            found = [rate(t.tolist()) if seeds <= FEW else two_way(t.tolist(), draws=300) for t in tables]
            assert np.mean([one.holds(truth) for one in found]) >= 0.90

    def test_bounds_hold_whatever_the_unscored_answers_are(self) -> None:
        rng = np.random.default_rng(3)
        for would_be in (0.0, 1.0):  # unscored answers are all of one kind: the worst case
            share = 0.7 * 0.3 + 0.3 * would_be
            found = []
            for _ in range(500):
                missing = rng.random(PROMPTS) < 0.3
                answers = np.where(rng.random(PROMPTS) < 0.3, 1.0, 0.0)
                found.append(bounds([None if m else a for m, a in zip(missing, answers, strict=True)]))
            assert np.mean([one.interval.holds(share) for one in found]) >= 0.95


class TestDifferences:
    @pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (2, 0.3), (3, 0.3), (5, 0.3), (5, 0.0)])
    def test_paired(self, seeds: int, seed_sd: float) -> None:
        rng = np.random.default_rng(10 + seeds)
        wide = math.hypot(PROMPT_SD, seed_sd) * rng.standard_normal(400_000)
        truth = float((chance(0.5 + wide) - chance(wide)).mean())
        held = 0
        for _ in range(200):
            prompt = PROMPT_SD * rng.standard_normal((1, PROMPTS))
            first, second = (
                toss(rng, shift + prompt + seed_sd * rng.standard_normal((seeds, 1))) for shift in (0.5, 0.0)
            )
            held += difference(first.tolist(), second.tolist(), draws=400).interval(0.90).holds(truth)
        assert held / 200 >= 0.86  # of 0.90, less two deviations of 200 trials

    def test_nearly_equal_models(self) -> None:
        rng, held = np.random.default_rng(20), 0
        for _ in range(500):  # 1 % of the answers change, each for the worse
            before = np.ones(PROMPTS)
            after = np.where(rng.random(PROMPTS) < 0.01, 0.0, 1.0)
            held += difference([after.tolist()], [before.tolist()]).interval(0.90).holds(-0.01)
        assert held / 500 >= 0.90

    @pytest.mark.parametrize("seeds", [1, 3, 5])
    def test_a_model_at_the_limit_is_called_equivalent_once_in_twenty(self, seeds: int) -> None:
        rng, called = np.random.default_rng(30 + seeds), 0
        for _ in range(400):
            before = np.ones((1, 300))
            worse = (rng.random((seeds, 300)) >= 0.02).astype(float)  # each change for the worse: the hardest case
            called += against(difference(worse.tolist(), before.tolist(), draws=200), 0.02).equivalent
        assert called / 400 <= 0.075

    def test_losses_and_divergence(self) -> None:
        rng, held = np.random.default_rng(40), np.zeros(3)
        for _ in range(300):
            base = rng.normal(2.0, 0.5, (1, 60))
            after = base + rng.normal(0.03, 0.1, (1, 60)) + rng.normal(0.0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 60))
            held[0] += difference(after.tolist(), base.tolist(), share=False).interval(0.90).holds(0.03)
            one = base + rng.normal(0.03, 0.1, (1, 60))
            held[1] += difference(one.tolist(), base.tolist(), share=False).interval(0.90).holds(0.03)
            found = divergence("t", rng.gamma(2.0, 0.05, (1, 60)).tolist(), None)
            assert found.low is not None
            assert found.high is not None
            held[2] += found.low <= 0.1 <= found.high
        assert (held / 300 >= 0.86).all()


class TestBudgets:
    def test_survival_and_its_area(self) -> None:
        rng, horizon = np.random.default_rng(50), 64.0
        for n, median in ((6, 8.0), (12, 24.0), (30, 8.0)):
            many = np.exp(rng.normal(math.log(median), 1.2, 400_000))
            area, at_8 = float(np.clip(np.log(np.minimum(many, horizon)), 0, None).mean()), float((many > 8).mean())
            held, held_8, asked = 0, 0, 0
            for _ in range(150):
                times = np.exp(rng.normal(math.log(median), 1.2, n))
                ends = np.where(rng.random(n) < 0.3, rng.uniform(8, horizon, n), horizon)
                found = kaplan_meier(
                    [
                        Run("a", i, float(t) if t <= end else None, float(min(t, end)), float(end))
                        for i, (t, end) in enumerate(zip(times, ends, strict=True))
                    ],
                    start=1.0,
                    horizon=horizon,
                )
                held += found.horizon < horizon or found.low <= area <= found.high
                before = [step for step in found.steps if step[0] <= 8]
                asked += bool(before)
                held_8 += bool(before) and before[-1][2] <= at_8 <= before[-1][3]
            assert held / 150 >= 0.90
            assert held_8 / asked >= 0.88

    def test_the_gain_of_one_model_over_another(self) -> None:
        rng, held = np.random.default_rng(51), 0
        wide = rng.normal(0, 1, 400_000)
        area = [float(np.clip(np.minimum(math.log(m) + wide, math.log(64)), 0, None).mean()) for m in (16, 4)]
        for _ in range(150):
            made = []
            for median in (16, 4):
                times = np.exp(rng.normal(math.log(median), 1, 10))
                runs = [Run("a", i, float(t) if t < 64 else None, float(t), 64.0) for i, t in enumerate(times)]
                made.append(kaplan_meier(runs, start=1.0, horizon=64.0))
            held += gain(made[0], made[1])[1].holds(area[0] - area[1])
        assert held / 150 >= 0.90

    @pytest.mark.parametrize("seeds", [2, 3, 6])
    def test_cost_ratio(self, seeds: int) -> None:
        rng, held = np.random.default_rng(60 + seeds), 0
        for _ in range(1000):
            both = [
                [Run("a", s, float(t), 0.9 * float(t), 1e9) for s, t in enumerate(np.exp(rng.normal(mu, 0.5, seeds)))]
                for mu in (5.0, 3.0)
            ]
            found = cost_ratio(both[0], both[1])
            assert found.low is not None
            assert found.high is not None
            held += found.low <= math.exp(2.0) <= found.high
        assert 0.92 <= held / 1000 <= 0.98

    @pytest.mark.parametrize("seeds", [3, 6])
    def test_what_is_carried_over(self, seeds: int) -> None:
        rng, held, known = np.random.default_rng(70 + seeds), 0, 0
        for _ in range(800):
            shared = rng.normal(0, 0.2, seeds)
            ends = fieller(list(1.0 + shared + rng.normal(0, 0.2, seeds)), list(2.0 + shared))
            known += ends is not None
            held += ends is not None and ends[0] <= 0.5 <= ends[1]
        assert known >= 780
        assert 0.92 <= held / known <= 0.98


class TestJudges:
    def test_kappa_alpha_and_raw_agreement(self) -> None:
        rng, draws = np.random.default_rng(80), 400
        truth = rng.random((2, 400_000)) < np.array([[0.3], [1.0]])
        first, second = (np.where(rng.random(400_000) < 0.1, ~truth[0], truth[0]) for _ in range(2))
        raw = float((first == second).mean())
        chance_of = float(first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean()))
        kappa = (raw - chance_of) / (1 - chance_of)
        held = np.zeros(3)
        for i in range(draws):
            at = slice(150 * i, 150 * (i + 1))
            found = agreement(first[at].tolist(), second[at].tolist(), draws=300)
            assert found.interval is not None
            assert found.kappa_interval is not None
            assert found.alpha_interval is not None
            held += [found.interval.holds(raw), found.kappa_interval.holds(kappa), found.alpha_interval.holds(kappa)]
        assert (held / draws >= 0.90).all()


class TestBeforeTheRun:
    @pytest.mark.parametrize(
        ("n", "seeds", "paired"),
        [(100, 1, True), (100, 3, True), (100, 10, True), (100, 1, False), (100, 5, False), (313, 3, True)],
    )
    def test_the_minimum_detectable_effect_is_found_four_times_in_five(self, n: int, seeds: int, paired: bool) -> None:
        rng, logit_sd = np.random.default_rng(90), 0.3  # about five points
        effect = mde(n, seeds, paired=paired)

        def gaps(shift: float, trials: int) -> Array:
            means = []
            prompt = PROMPT_SD * rng.standard_normal((trials, 1, n))
            for side in (-shift / 2, shift / 2):
                mine = prompt if paired else PROMPT_SD * rng.standard_normal((trials, 1, n))
                means.append(toss(rng, side + mine + logit_sd * rng.standard_normal((trials, seeds, 1))).mean((1, 2)))
            difference_: Array = means[1] - means[0]
            return difference_

        wide = math.hypot(PROMPT_SD, logit_sd) * rng.standard_normal(200_000)
        shifts = np.linspace(0.0, 3.0, 61)
        effects = [float((chance(s / 2 + wide) - chance(wide - s / 2)).mean()) for s in shifts]
        trials = 60_000 // (n * seeds) * 20
        limit = 1.96 * float(gaps(0.0, trials).std())
        assert np.mean(np.abs(gaps(float(np.interp(effect, effects, shifts)), trials)) > limit) == pytest.approx(
            0.80, abs=0.06
        )

    def test_the_least_limit_is_passed_four_times_in_five(self) -> None:
        rng, n = np.random.default_rng(91), 400
        delta, passed = least_delta(n, 1, discordant=0.05), 0
        for _ in range(300):
            first = (rng.random(n) < 0.5).astype(float)
            second = np.where(rng.random(n) < 0.05, 1 - first, first)
            passed += tost([second.tolist()], [first.tolist()], delta=delta).equivalent
        assert passed / 300 >= 0.74

    @pytest.mark.parametrize(("n", "seed_sd"), [(313, 0.0), (313, 0.05), (100, 0.0), (100, 0.05)])
    def test_the_greatest_of_fifty(self, n: int, seed_sd: float) -> None:
        rng = np.random.default_rng(92)
        rates = 0.5 + seed_sd * rng.standard_normal((4000, 50))
        shares = rng.binomial(n, np.clip(rates, 0, 1)) / n
        best = shares.argmax(axis=1)
        found = winners_curse(50, n, seed_sd=seed_sd)
        assert found.reported == pytest.approx(shares.max(axis=1).mean() - 0.5, abs=0.004)
        assert found.artefact == pytest.approx(rates[np.arange(4000), best].mean() - 0.5, abs=0.004)
        assert found.recipe == 0.0


def test_quantiles() -> None:
    assert t_quantile(0.975, 2) == pytest.approx(4.302653, abs=1e-6)
    assert t_quantile(0.975, math.inf) == pytest.approx(1.959964, abs=1e-6)
