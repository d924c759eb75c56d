"""Booster's gradient against autograd on a two-layer float64 model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slow
from immunity.errors import PrecisionError, SettingsError
from immunity.losses import nll
from immunity.mechanisms import LookAhead
from immunity.methods.booster import Booster
from immunity.methods.sft import SFT
from immunity.simulated import pulled_back
from immunity.testing import tiny
from immunity.theta import Theta, Vector

DATA = {
    "alignment": tiny.batch(4, seed=1, role="alignment"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
}


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def harmful_at(network, at, g, *, alpha: float, mean: str, exact: bool) -> torch.Tensor:
    """h one normalised step along ``g`` away; ``g`` is a constant unless exact."""
    g = g if exact else {n: t.detach() for n, t in g.items()}
    size = slow.norm(g) + 1e-7
    return slow.mean_loss(network, {n: at[n] - alpha * g[n] / size for n in at}, DATA["harmful"], mean=mean)


def oracle(network: torch.nn.Module, method: Booster, *, exact: bool) -> slow.Weights:
    """Autograd of  f(theta) + lam [h(theta) - h(theta - alpha g/|g|)]."""
    at = slow.weights(network)
    h = slow.mean_loss(network, at, DATA["harmful"], mean=method.mean)
    g = slow.gradient(h, at, graph=True)
    away = harmful_at(network, at, g, alpha=method.alpha, mean=method.mean, exact=exact)
    f = slow.mean_loss(network, at, DATA["alignment"], mean=method.mean)
    return slow.gradient(f + method.lam * (h - away), at)


def error(network: torch.nn.Module, method: Booster, *, exact: bool) -> float:
    theta = Theta(network)
    return slow.relative_error(named(theta, method.gradient(theta, DATA)), oracle(network, method, exact=exact))


@pytest.mark.parametrize("method", [Booster(), Booster.released(), Booster(alpha=1.0, lam=0.5)], ids=repr)
def test_first_order_equals_autograd_with_the_direction_detached(network, method):
    assert error(network, method, exact=False) < 1e-9


@pytest.mark.parametrize(
    ("method", "within"),
    [
        (Booster.paper(), 1e-6),
        (replace(Booster.released(), curvature="central"), 1e-6),
        (Booster(curvature="central", alpha=0.01, lam=1.0), 1e-6),
        (Booster(curvature="forward"), 1e-4),
    ],
    ids=repr,
)
def test_exact_equals_autograd_through_the_normalised_step(network, method, within):
    assert error(network, method, exact=True) < within
    # The oracle can tell: without the term the gradient is far away from the exact one.
    assert error(network, replace(method, curvature="none"), exact=True) > 1e-3


def bracket(network, theta: Theta, method: Booster) -> Vector:
    """What lam multiplies."""
    return (1.0 / method.lam) * (method.gradient(theta, DATA) - theta.grad(nll, DATA["alignment"]))


def test_the_relative_error_of_the_first_order_falls_like_alpha(network):
    theta, errors = Theta(network), []
    for alpha in (1e-2, 1e-3, 1e-4):
        first, exact = (bracket(network, theta, Booster(alpha=alpha, curvature=c)) for c in ("none", "central"))
        errors.append((first - exact).norm() / exact.norm())
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.25)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("curvature", ["none", "central"])
def test_it_is_a_penalty_on_the_length_of_the_harmful_gradient(network, curvature):
    at = slow.weights(network)
    length = slow.norm(slow.gradient(slow.mean_loss(network, at, DATA["harmful"]), at, graph=True))
    theta = Theta(network)
    penalty = slow.gradient(length, at)
    want = Vector([penalty[name] for name in theta.names])
    for alpha in (1e-3, 1e-4):
        method = Booster(alpha=alpha, curvature=curvature)
        got = method.lam * bracket(network, theta, method)
        assert (got @ want) / (got.norm() * want.norm()) > 0.999
        assert got.norm() / (method.lam * alpha * want.norm()) == pytest.approx(1.0, abs=0.02)


def test_lam_zero_is_sft_bit_for_bit_and_the_default_is_not(network):
    theta = Theta(network)
    for mean in ("example", "token"):
        plain = SFT(mean=mean).gradient(theta, DATA).tensors()
        silent = Booster(lam=0.0, mean=mean).gradient(theta, DATA).tensors()
        assert all(torch.equal(a, b) for a, b in zip(plain, silent, strict=True))
    away = Booster().gradient(theta, DATA) - SFT().gradient(theta, DATA)
    assert away.norm() > 1e-2 * SFT().gradient(theta, DATA).norm()


@pytest.mark.parametrize("curvature", ["none", "forward", "central"])
def test_alpha_zero_leaves_exactly_nothing_of_the_bracket(network, curvature):
    theta = Theta(network)
    got = Booster(alpha=0.0, curvature=curvature).gradient(theta, DATA)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), SFT().gradient(theta, DATA).tensors(), strict=True))


def test_the_step_goes_down_with_one_global_norm_and_home_bit_for_bit(network, monkeypatch):
    moves, real = [], Theta.step
    monkeypatch.setattr(Theta, "step", lambda self, by: (moves.append(by), real(self, by))[1])
    theta = Theta(network)
    before = [p.detach().clone() for p in theta.parameters]
    Booster(alpha=0.3).gradient(theta, DATA)
    assert len(moves) == 1
    assert moves[0].norm() == pytest.approx(0.3, rel=1e-6)
    assert moves[0] @ theta.grad(nll, DATA["harmful"]) < 0, "the simulated attacker descends"
    assert max(float(t.norm()) for t in moves[0].tensors()) < 0.29
    assert all(torch.equal(a, p) for a, p in zip(before, theta.parameters, strict=True))
    assert {"nll/harmful", "nll/harmful@1", "nll/alignment"} <= set(theta.trace)


def test_training_on_it_makes_a_harmful_step_gain_less_than_sft_does():
    def gain(method) -> float:
        theta = Theta(tiny.gpt2())
        for _ in range(40):
            theta.step(-0.05 * method.gradient(theta, DATA))
        here = theta.value(nll, DATA["harmful"])
        with theta.moved(-0.1 * theta.grad(nll, DATA["harmful"]).unit()):
            return here - theta.value(nll, DATA["harmful"])

    assert gain(Booster(lam=5.0)) < 0.8 * gain(SFT())


def test_three_gradients_and_one_or_two_more_for_curvature(network, monkeypatch):
    count, real = [], Theta.grad
    monkeypatch.setattr(Theta, "grad", lambda self, *given: (count.append(given), real(self, *given))[1])
    theta = Theta(network)
    for curvature, n in (("none", 3), ("forward", 4), ("central", 5)):
        count.clear()
        Booster(curvature=curvature).gradient(theta, DATA)
        assert len(count) == n


def test_micro_batches_change_nothing(network):
    whole, split = (Booster(mean="token").gradient(Theta(network, micro_batch=m), DATA) for m in (None, 1))
    assert (whole - split).norm() < 1e-11 * whole.norm()


def test_what_cannot_be_is_refused(network):
    with pytest.raises(PrecisionError, match="autocast"):
        Booster.paper().gradient(Theta(tiny.llama(), autocast=torch.bfloat16), DATA)
    for settings in ({"alpha": -1.0}, {"lam": -0.1}):
        with pytest.raises(SettingsError):
            Booster(**settings)
    theta, harmful = Theta(network), DATA["harmful"]
    g = theta.grad(nll, harmful)
    with pytest.raises(SettingsError, match="adam"):
        pulled_back(theta, nll, harmful, g, g, rule="adam", alpha=0.1, curvature="central")


def test_what_it_declares():
    model = tiny.language_model()
    assert Booster().mechanisms == (LookAhead(steps=1, radius=0.1, rule="normalised"),)
    assert [p.where for p in Booster(alpha=0.0, lam=0.0).problems(model)] == ["alpha", "lam"]
    assert not Booster(alpha=0.0).mechanisms
    assert not Booster().problems(model)
