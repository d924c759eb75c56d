"""EXP3 over two groups: one step by hand, where it goes, and where it may not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity.samplers import Exp3


def test_one_step_equals_the_value_by_hand_for_both_arms():
    second = Exp3(eta=0.5, floor=0.0, p=0.25)
    second.learn(1, 0.8)  # the drawn arm's weight times exp(0.5 * 0.8 / 0.25)
    assert second.p == pytest.approx(0.25 * math.exp(1.6) / (0.25 * math.exp(1.6) + 0.75), rel=1e-14)
    first = Exp3(eta=0.5, floor=0.0, p=0.25)
    first.learn(0, 0.8)  # its probability is 0.75
    rise = 0.75 * math.exp(0.4 / 0.75)
    assert first.p == pytest.approx(0.25 / (0.25 + rise), rel=1e-14)


def test_it_stays_within_its_bounds_and_without_them_an_arm_dies_out():
    for arm, end in ((1, 0.9), (0, 0.1)):
        clipped = Exp3(eta=1.0, floor=0.1)
        for _ in range(50):
            clipped.learn(arm, 3.0)
        assert clipped.p == pytest.approx(end, rel=1e-12)
    free = Exp3(eta=1.0, floor=0.0)
    for _ in range(50):
        free.learn(1, 3.0)
    assert free.p > 0.999


@given(p=st.floats(0.001, 0.999), loss=st.floats(0.0, 1e6), eta=st.floats(0.0, 10.0), arm=st.sampled_from([0, 1]))
def test_the_drawn_arm_never_becomes_less_likely_and_nothing_overflows(p, loss, eta, arm):
    sampler = Exp3(eta=eta, floor=0.0, p=p)
    sampler.learn(arm, loss)
    assert 0.0 <= sampler.p <= 1.0
    assert sampler.p >= p * (1 - 1e-12) if arm else sampler.p <= p * (1 + 1e-12) + 1e-15


def mean_p(losses: tuple[float, float], runs: int = 40, steps: int = 200) -> float:
    total = 0.0
    for _ in range(runs):
        sampler = Exp3(eta=0.02, floor=0.1)
        for _ in range(steps):
            arm = sampler.draw()
            sampler.learn(arm, losses[arm])
        total += sampler.p
    return total / runs


def test_it_moves_to_the_group_with_the_higher_loss():
    torch.manual_seed(1)
    assert mean_p((0.5, 1.0)) > 0.75
    assert mean_p((1.0, 0.5)) < 0.25


def test_equal_losses_keep_it_near_one_half():
    torch.manual_seed(1)
    assert mean_p((0.8, 0.8)) == pytest.approx(0.5, abs=0.08)


def test_a_single_step_is_unbiased_to_first_order():
    """Without the importance weight an arm that is drawn more often would rise for that alone."""
    step = 1e-6
    drift = 0.0
    for arm, chance in ((1, 0.8), (0, 0.2)):
        sampler = Exp3(eta=step, floor=0.0, p=0.8)
        sampler.learn(arm, 1.0)
        drift += chance * (sampler.p - 0.8) / step
    assert drift == pytest.approx(0.0, abs=1e-4)


def test_draws_follow_the_probability_and_the_step_seed():
    torch.manual_seed(0)
    sampler = Exp3(p=0.3)
    share = sum(sampler.draw() for _ in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.03)
    torch.manual_seed(7)
    first = [sampler.draw() for _ in range(20)]
    torch.manual_seed(7)
    assert [sampler.draw() for _ in range(20)] == first


def test_its_state_is_its_probability():
    sampler = Exp3(eta=0.3)
    sampler.learn(1, 1.0)
    other = Exp3(eta=0.3)
    other.load_state_dict(sampler.state_dict())
    assert other == sampler
    assert other.p != 0.5
