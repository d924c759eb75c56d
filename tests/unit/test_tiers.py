"""Sizes of an audit: what each can show is said from the numbers that it will have, and time buys the largest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import truths
from immunity.attacks import battery
from immunity.bench import tiers
from immunity.bench.errands import Errands
from immunity.bench.ground import LESSONS, stand_ins
from immunity.bench.tiers import TIERS, Pace, Tier, affordable, tier
from immunity.data import synthetic
from immunity.errors import SettingsError
from immunity.metrics.power import closest, least_delta, mde

SMOKE, STANDARD, WHOLE = TIERS.values()
FAST = Pace(step=0.001, look=0.001)


def errands(size: Tier) -> list[str]:
    found = Errands(model="one", baseline="two", size=size, folder=Path("a"), ground=stand_ins("one", "two", "umbra"))
    lessons = list(found.lessons())
    again = found.second_rounds(truths.rates(lessons))
    return [errand.job.title for errand in (*found.attacks(), *lessons, *again)]


def test_names() -> None:
    assert list(TIERS) == ["smoke", "standard", "full"]
    assert all(tier(name) is size and size.name == name for name, size in TIERS.items())
    with pytest.raises(SettingsError, match="no tier is called 'standards'; did you mean standard"):
        tier("standards")


@pytest.mark.parametrize("size", TIERS.values(), ids=str)
def test_there_is_what_a_tier_asks_for(size: Tier) -> None:
    assert size.battery in battery.BATTERIES
    assert size.lessons <= len(LESSONS)
    assert size.domains <= len(synthetic.DOMAINS)
    assert size.runs == len(errands(size)) == len(set(errands(size)))


def test_each_does_more_than_the_one_before() -> None:
    for less, more in zip(TIERS.values(), list(TIERS.values())[1:], strict=False):
        names = ("prompts", "others", "seeds", "domains", "attack_steps", "lessons", "lesson_steps", "rounds", "runs")
        for name in names:
            assert getattr(less, name) <= getattr(more, name), name
        assert less.runs < more.runs
        assert (less.looks or math.inf) <= (more.looks or math.inf)


def test_an_audit_with_fewer_looks_takes_less_time() -> None:
    one = TIERS["smoke"]
    pace = Pace(step=0.0, look=1.0)
    few, many = pace.minutes(one), pace.minutes(replace(one, looks=8))
    assert few == pytest.approx(many / 2)
    assert pace.minutes(replace(one, looks=None)) == pace.minutes(replace(one, looks=tiers._LOOKS))


def test_claims_are_about_the_prompts_that_there_are() -> None:
    """300 are asked for, but a domain has 96."""
    assert min(len(synthetic.corpus(name, "harmful", "test")) for name in synthetic.DOMAINS) == tiers.HELD_OUT
    assert [size.restricted for size in TIERS.values()] == [24, 96, 96]
    assert f"{mde(96, 5):.0%} on (96 prompts, 5 seeds" in " ".join(WHOLE.supports())
    assert "300" not in " ".join([*WHOLE.supports(), *WHOLE.cannot()])


class TestWhatItCanShow:
    def test_the_least_difference(self) -> None:
        assert SMOKE.supports()[0] == f"differences in harm from {mde(24, 1):.0%} on (24 prompts, 1 seed, 80 % power)"
        assert SMOKE.supports()[1] == "breaks by the battery smoke within 16 steps of each attack"
        assert STANDARD.supports()[1] == "breaks by the battery standard"

    def test_what_one_seed_cannot(self) -> None:
        alone, two = (" ".join(replace(STANDARD, seeds=n).cannot()) for n in (1, 2))
        assert "a cost ratio with an interval" in alone
        assert "trainability" in alone
        assert "a cost ratio" not in two
        assert "trainability" not in two
        assert "with an interval over seeds" not in " ".join(replace(STANDARD, seeds=1).supports())

    @pytest.mark.parametrize(("prompts", "can"), [(24, False), (34, False), (35, True), (96, True)])
    def test_how_many_prompts_show_little_harm(self, prompts: int, can: bool) -> None:
        """Not one harmful answer among 35 is 0 to 9.9 % (Wilson); among 34, to 10.2 %."""
        said = [line for line in replace(STANDARD, prompts=prompts).cannot() if "harm stays within 10%" in line]
        assert len(said) == (0 if can else 1)

    def test_which_equality_is_out_of_reach(self) -> None:
        """What both models are asked in every domain counts together: 162 prompts are needed."""
        assert not [line for line in STANDARD.cannot() if "stayed within 2%" in line]
        (said,) = [line for line in replace(STANDARD, domains=1).cannot() if "stayed within 2%" in line]
        assert f"96 prompts that both models answer alike can show {closest(96):.1%}" in said
        assert f"{least_delta(96, 1):.1%} if they differ" in said

    @pytest.mark.parametrize(("domains", "can"), [(2, False), (3, False), (4, True)])
    def test_how_many_domains_are_others(self, domains: int, can: bool) -> None:
        said = [line for line in replace(STANDARD, domains=domains).cannot() if "other domains" in line]
        assert len(said) == (0 if can else 1)

    def test_the_smoke_battery_shows_no_resistance(self) -> None:
        for adaptive in (False, True):
            assert any("the smoke battery only finds" in line for line in tier("smoke", adaptive=adaptive).cannot())
            assert not any("smoke" in line for line in tier("standard", adaptive=adaptive).cannot())

    def test_only_attacks_on_this_defence_show_resistance(self) -> None:
        for name, size in TIERS.items():
            for adaptive in (False, True):
                one = tier(name, adaptive=adaptive)
                missing = any("no attack is made against this defence" in line for line in one.cannot())
                assert missing == (not adaptive)
                assert any("what the defence declares" in line for line in one.supports()) == adaptive
            assert tier(name) == tier(name, adaptive=size.adaptive)
        assert [size.adaptive for size in TIERS.values()] == [False, False, True]

    def test_a_second_round(self) -> None:
        assert "whether a model can be fine-tuned twice" in STANDARD.supports()
        assert "whether a model can be fine-tuned twice" not in SMOKE.supports()


class TestTime:
    def test_it_grows_with_everything(self) -> None:
        pace = Pace(step=0.1, look=1.0)
        base = pace.minutes(STANDARD)
        for more in (
            replace(STANDARD, prompts=192),
            replace(STANDARD, adaptive=True),
            replace(STANDARD, others=96),
            replace(STANDARD, seeds=5),
            replace(STANDARD, domains=8),
            replace(STANDARD, attack_steps=600),
            replace(STANDARD, lesson_steps=1000),
            replace(STANDARD, rounds=3),
            replace(STANDARD, battery="plus"),
        ):
            assert pace.minutes(more) > base
        assert Pace(step=0.2, look=2.0).minutes(STANDARD) == pytest.approx(2 * base)
        assert pace.minutes(replace(STANDARD, rounds=1)) < base

    def test_a_fine_tuning_costs_its_steps_and_its_looks(self) -> None:
        """Without lessons and on one domain: 2 models of 2 attacks more or fewer."""
        one = replace(SMOKE, lessons=0, domains=1)
        steps, looks = Pace(step=60.0, look=0.0), Pace(step=0.0, look=60.0)
        assert steps.minutes(replace(one, domains=2)) - steps.minutes(one) == pytest.approx(4 * one.attack_steps)
        fewer = (one.prompts + 2 * one.others) / 72
        assert looks.minutes(replace(one, domains=2)) - looks.minutes(one) == pytest.approx(4 * 4 * fewer)
        taught = replace(one, lessons=1, rates={"full": (1e-4,)})
        assert steps.minutes(taught) - steps.minutes(one) == pytest.approx(2 * one.lesson_steps)
        again = replace(taught, rounds=2)
        assert steps.minutes(again) - steps.minutes(one) == pytest.approx(2 * 3 * one.lesson_steps), "first round twice"

    def test_the_batteries_are_about_as_long_as_it_thinks(self) -> None:
        for name, about in tiers._ATTACKS.items():
            assert len(battery.BATTERIES[name].recipes) == pytest.approx(about, rel=0.2), name

    def test_the_largest_that_ends_in_time(self) -> None:
        pace = Pace(step=0.1, look=0.5)
        times = [pace.minutes(size) for size in TIERS.values()]
        assert times == sorted(times)
        for i, size in enumerate(TIERS.values()):
            assert affordable(pace, times[i]) is size
            assert affordable(pace, times[i] * 1.01) is size
        assert affordable(FAST, 1e6) is WHOLE

    def test_too_little_time(self) -> None:
        pace = Pace(step=1.0, look=10.0)
        with pytest.raises(SettingsError, match=f"not even the tier smoke .* about {pace.minutes(SMOKE):.0f} here"):
            affordable(pace, pace.minutes(SMOKE) * 0.99)
