"""What a number of prompts and seeds can show, before anything is run; and what a maximum over many trials is worth.

One model of the noise is behind all of it: a prompt has a difficulty (normal on the logit scale, the same for both
models), a seed moves a model as a whole, and given both an answer is a coin toss. For two models whose difference is
asked after,

    se² = (2 σ_s² + 2 E[p (1 - p)] / n) / S  +  (not paired) 2 Var(p) / n,

with σ_s the deviation of seeds in points, p the chance of one prompt, n prompts and S seeds of each model. One seed
cannot support a claim smaller than about 23 points, however many prompts there are; beyond about 100 prompts another
seed pays more than more prompts.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np

from immunity.errors import SettingsError
from immunity.metrics.stats import FEW, t_quantile

SEED_SD: Final = 0.05
"""Five points: how far seeds differ, where that is not known (at a share near one half)."""

PROMPT_SD: Final = 1.5
"""How far prompts differ, on the logit scale, where that is not known."""


class Optimism(NamedTuple):
    """What the greatest of many equal trials shows above what each of them is worth.

    Attributes:
        reported: Expected excess of the maximum itself.
        artefact: What is left of it when the same checkpoint is asked fresh prompts: real, the attacker holds that one.
        recipe: What is left when its settings are run with a fresh seed: nothing.
    """

    reported: float
    artefact: float
    recipe: float


def standard_error(
    n: int,
    seeds: int,
    *,
    share: float = 0.5,
    seed_sd: float = SEED_SD,
    prompt_sd: float = PROMPT_SD,
    paired: bool = True,
) -> float:
    """The standard error of the difference of two models with n prompts and so many seeds each.

    Args:
        n: Prompts.
        seeds: Of each model.
        share: About where both models are, in (0, 1).
        seed_sd: Standard deviation of a model's rate over seeds, as a share.
        prompt_sd: Of prompts, on the logit scale.
        paired: Whether both models are asked the same prompts.

    Raises:
        SettingsError: An argument is out of range.
    """
    if n < 1 or seeds < 1 or not 0.0 < share < 1.0 or seed_sd < 0.0 or prompt_sd < 0.0:
        raise SettingsError(
            f"n = {n}, seeds = {seeds}, share = {share}, seed_sd = {seed_sd}, prompt_sd = {prompt_sd}: "
            "prompts and seeds are at least 1, the share lies strictly between 0 and 1, deviations are not negative"
        )
    toss, between = _variances(share, prompt_sd)
    variance = (2.0 * seed_sd**2 + 2.0 * toss / n) / seeds
    return math.sqrt(variance if paired else variance + 2.0 * between / n)


def mde(
    n: int,
    seeds: int,
    *,
    share: float = 0.5,
    seed_sd: float = SEED_SD,
    prompt_sd: float = PROMPT_SD,
    paired: bool = True,
    power: float = 0.80,
    alpha: float = 0.05,
) -> float:
    """The minimum detectable effect: the least true difference that a two-sided test at ``alpha`` finds with ``power``.

    The standard error counts as known: with few seeds that it must be estimated from, more is needed.

    Raises:
        SettingsError: See :func:`standard_error`.
    """
    found = standard_error(n, seeds, share=share, seed_sd=seed_sd, prompt_sd=prompt_sd, paired=paired)
    z = NormalDist().inv_cdf
    return (z(1.0 - alpha / 2.0) + z(power)) * found


def least_delta(
    n: int, seeds: int, *, discordant: float = 0.05, seed_sd: float = 0.0, power: float = 0.80, alpha: float = 0.05
) -> float:
    """The least δ for which an equivalence test on the same prompts passes with ``power`` if the models are the same.

    It has the four made-up prompts and, for several seeds, the degrees of freedom of ``equivalence.tost``: so it tells
    before the run whether ±2 points can be shown at all.

    Args:
        n: Prompts.
        seeds: Of each model; 1 is a claim about these two models only, and ``seed_sd`` is not in it.
        discordant: Share of prompts on which just one of the two succeeds, in one seed.
        seed_sd: Standard deviation of the difference over seeds.
        power: Chance of passing.
        alpha: Of each of the two tests.

    Raises:
        SettingsError: An argument is out of range.
    """
    if n < 2 or seeds < 1 or not 0.0 <= discordant <= 1.0 or seed_sd < 0.0:
        raise SettingsError(f"n = {n}, seeds = {seeds}, discordant = {discordant}, seed_sd = {seed_sd}: out of range")
    prompts = (discordant * n + 4.0) / (n + 4.0) ** 2  # the same prompts differ in every seed: not divided by seeds
    se = math.sqrt(prompts + (seed_sd**2 / seeds if seeds > 1 else 0.0))
    df = n + 3.0 if seeds == 1 else seeds - 1.0
    return (t_quantile(1.0 - alpha, df) + t_quantile(0.5 + power / 2.0, math.inf)) * se


def closest(n: int, seeds: int = 1, *, alpha: float = 0.05) -> float:
    """The least δ that so many prompts can show at all: that of two models which answer every prompt alike.

    It is below 2 points from 162 prompts on, with one seed.

    Raises:
        SettingsError: There is no prompt, or no seed.
    """
    if n < 1 or seeds < 1:
        raise SettingsError(f"n = {n}, seeds = {seeds}: both are at least 1")
    df = n + 3.0 if seeds == 1 else seeds - 1.0 if seeds <= FEW else math.inf
    return t_quantile(1.0 - alpha, df) * math.sqrt(4.0 / ((n + 3.0) * (n + 4.0)))


def winners_curse(trials: int, n: int, *, seed_sd: float = SEED_SD, share: float = 0.5) -> Optimism:
    """How much too high the greatest of many equal trials is, as reported, on fresh prompts, and with a fresh seed.

    With E_K the expected maximum of K standard normals, the excess is E_K (σ_s² + p (1 - p) / n)^½, and the part of it
    that the seed made, σ_s² / (σ_s² + p (1 - p) / n), is still there on fresh prompts.

    Args:
        trials: How many were compared.
        n: Prompts of each.
        seed_sd: Standard deviation of a trial's true rate, as a share.
        share: What each is worth on average.

    Raises:
        SettingsError: An argument is out of range.
    """
    if trials < 1 or n < 1 or not 0.0 <= share <= 1.0 or seed_sd < 0.0:
        raise SettingsError(f"trials = {trials}, n = {n}, share = {share}, seed_sd = {seed_sd}: out of range")
    noise = share * (1.0 - share) / n
    both = seed_sd**2 + noise
    reported = _greatest(trials) * math.sqrt(both)
    return Optimism(reported, reported * seed_sd**2 / both if both > 0.0 else 0.0, 0.0)


def _greatest(k: int) -> float:
    """The expected maximum of k standard normals: ∫ x k φ(x) Φ(x)^(k-1) dx."""
    x = np.linspace(-9.0, 9.0, 20_001)
    density = np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    return float((x * k * density * np.minimum(below, 1.0) ** (k - 1)).sum() * (x[1] - x[0])) if k > 1 else 0.0


def _variances(share: float, prompt_sd: float) -> tuple[float, float]:
    """E[p (1 - p)] and Var(p) over prompts whose mean is ``share``."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        p = 1.0 / (1.0 + np.exp(-(middle + prompt_sd * nodes)))
        low, high = (middle, high) if float(weights @ p) < share else (low, middle)
    p = 1.0 / (1.0 + np.exp(-(0.5 * (low + high) + prompt_sd * nodes)))
    toss = float(weights @ (p * (1.0 - p)))
    return toss, share * (1.0 - share) - toss
