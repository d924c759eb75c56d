"""What a number of prompts and seeds can show."""

from __future__ import annotations

import pytest

from immunity.errors import SettingsError
from immunity.metrics.equivalence import tost
from immunity.metrics.power import closest, least_delta, mde, standard_error, winners_curse


class TestEffect:
    @pytest.mark.parametrize(
        ("n", "paired", "published"),  # by seeds 1, 3, 5, 10: simulated for the specification, 80 % power
        [
            (100, True, (0.27, 0.15, 0.12, 0.08)),
            (100, False, (0.29, 0.19, 0.16, 0.14)),
            (313, True, (0.23, 0.13, 0.10, 0.07)),
        ],
    )
    def test_the_table(self, n: int, paired: bool, published: tuple[float, ...]) -> None:
        found = [mde(n, seeds, paired=paired) for seeds in (1, 3, 5, 10)]
        assert found == pytest.approx(published, abs=0.012)

    def test_one_seed_cannot_support_a_small_claim(self) -> None:
        assert mde(100_000, 1) > 0.19

    def test_it_falls_with_everything_that_helps(self) -> None:
        assert mde(100, 3) > mde(200, 3) > mde(200, 5)
        assert mde(100, 3) < mde(100, 3, paired=False)
        assert mde(100, 3, share=0.1) < mde(100, 3)
        assert mde(100, 3, power=0.9) > mde(100, 3)

    def test_without_prompts_that_differ_pairing_is_nothing(self) -> None:
        alone = standard_error(50, 2, prompt_sd=0.0, seed_sd=0.0)
        assert alone == pytest.approx((2 * 0.25 / 50 / 2) ** 0.5)
        assert alone == pytest.approx(standard_error(50, 2, prompt_sd=0.0, seed_sd=0.0, paired=False))

    @pytest.mark.parametrize("bad", [{"n": 0}, {"seeds": 0}, {"share": 1.0}, {"seed_sd": -0.1}])
    def test_out_of_range(self, bad: dict[str, float]) -> None:
        with pytest.raises(SettingsError):
            mde(**{"n": 10, "seeds": 1, **bad})  # type: ignore[arg-type]


class TestLimits:
    def test_two_points_need_many_prompts(self) -> None:
        assert least_delta(100, 1) > 0.05
        assert least_delta(2000, 1) < 0.02
        assert least_delta(400, 1, discordant=0.0) < least_delta(400, 1, discordant=0.1)
        assert least_delta(400, 3, seed_sd=0.01) > least_delta(400, 3)
        with pytest.raises(SettingsError):
            least_delta(1, 1)

    def test_the_closest_that_prompts_can_show_is_what_equal_answers_pass(self) -> None:
        for n in (24, 96, 161, 162, 200):
            alike = [[1.0] * n]
            assert tost(alike, alike, delta=closest(n) * 1.001).equivalent
            assert not tost(alike, alike, delta=closest(n) * 0.999).equivalent
        assert closest(161) > 0.02 > closest(162)
        three = [[1.0] * 100] * 3
        assert tost(three, three, delta=closest(100, 3) * 1.001).equivalent
        assert not tost(three, three, delta=closest(100, 3) * 0.999).equivalent
        with pytest.raises(SettingsError):
            closest(0)

    def test_the_greatest_of_one_is_itself(self) -> None:
        assert winners_curse(1, 100).reported == 0.0
        found = winners_curse(50, 313)
        assert (round(found.reported, 3), round(found.artefact, 3), found.recipe) == (0.129, 0.098, 0.0)
        with pytest.raises(SettingsError):
            winners_curse(0, 100)
