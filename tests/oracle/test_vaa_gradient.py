"""VAA's direction against autograd at the drawn point of the drawn group, on a two-layer float64 model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import slow
from immunity.errors import SettingsError
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.mechanisms import LookAhead
from immunity.methods.sft import SFT
from immunity.methods.vaa import GROUPS, VAA
from immunity.testing import tiny
from immunity.theta import Theta, Vector

DATA = {role: tiny.batch(4, seed=i, role=role) for i, role in enumerate(GROUPS)}
MODEL = tiny.language_model()
SAM = VAA(curriculum="none")
PLAIN = VAA(curriculum="none", lam=0.0)


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def stepped(method: VAA, theta: Theta, seed: int = 0) -> Vector:
    """The first step of a fresh direction under the random numbers of ``seed``."""
    torch.manual_seed(seed)
    return method.start(MODEL)(theta, DATA)


def drawn(theta: Theta) -> str:
    """The group that the last step drew."""
    (role,) = {key.removeprefix("nll/").partition("@")[0] for key in theta.trace if key.startswith("nll/")}
    return role


def oracle(network, role: str, *, rho: float, mean: str = "example") -> slow.Weights:
    """The gradient at theta + rho g/|g|, taken on weights of its own."""
    at = slow.weights(network)
    g = slow.gradient(slow.mean_loss(network, at, DATA[role], mean=mean), at)
    scale = float(rho / (slow.norm(g) + 1e-7))
    away = {name: (at[name] + scale * g[name]).detach().requires_grad_() for name in at}
    return slow.gradient(slow.mean_loss(network, away, DATA[role], mean=mean), away)


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("method", [SAM, PLAIN], ids=["sam", "plain"])
def test_it_is_the_gradient_of_the_drawn_group_at_the_drawn_point(network, method, mean):
    seen = set()
    for seed in range(6):
        theta = Theta(network)
        got = stepped(replace(method, mean=mean), theta, seed)
        want = oracle(network, drawn(theta), rho=method.rho if method.lam else 0.0, mean=mean)
        assert slow.relative_error(named(theta, got), want) < 1e-9
        seen.add(drawn(theta))
    assert seen == set(GROUPS)


def test_with_lam_zero_it_is_sft_on_the_drawn_group_bit_for_bit(network):
    theta = Theta(network)
    for seed in range(6):
        got = stepped(PLAIN, theta, seed)
        rows = {"alignment": DATA[drawn(theta)]}
        theta.clear()
        want = SFT().gradient(theta, rows)
        assert all(torch.equal(a, b) for a, b in zip(got.tensors(), want.tensors(), strict=True))
        theta.clear()


def test_the_mean_over_coins_is_the_mixture_of_both_gradients(network):
    theta, lam = Theta(network), 0.3
    groups = {role: [theta.grad(nll, DATA[role])] for role in GROUPS}
    for role, found in groups.items():
        with theta.moved(0.4 * found[0].unit()):
            found.append(theta.grad(nll, DATA[role]))
    theta.clear()
    method, runs = replace(SAM, lam=lam, eta=0.0), 400
    counts = {(role, away): 0 for role in GROUPS for away in (False, True)}
    total: Vector | None = None
    for seed in range(runs):
        g = stepped(method, theta, seed)
        away = any("@1" in key for key in theta.trace)
        role = drawn(theta)
        theta.clear()
        counts[role, away] += 1
        if counts[role, away] == 1:
            assert torch.equal(g.tensors()[0], groups[role][away].tensors()[0])
        total = g if total is None else total + g
    assert total is not None
    want = sum((0.5 * ((1 - lam) * g + lam * far) for g, far in groups.values()), 0.0 * total)
    spread = (groups["alignment"][0] - groups["vulnerable"][0]).norm() / want.norm()
    assert ((1 / runs) * total - want).norm() / want.norm() < 3 * spread / runs**0.5
    assert sum(n for (_, away), n in counts.items() if away) / runs == pytest.approx(lam, abs=0.08)


def test_the_perturbation_goes_up_by_rho_and_comes_home_bit_for_bit(network, monkeypatch):
    moves, real = [], Theta.step
    monkeypatch.setattr(Theta, "step", lambda self, by: (moves.append(by), real(self, by))[1])
    theta = Theta(network)
    before = [p.detach().clone() for p in theta.parameters]
    stepped(replace(SAM, rho=0.7), theta)
    assert len(moves) == 1
    assert moves[0].norm() == pytest.approx(0.7, rel=1e-6)
    assert moves[0] @ theta.grad(nll, DATA[drawn(theta)]) > 0, "the loss rises there"
    assert all(torch.equal(a, p) for a, p in zip(before, theta.parameters, strict=True))


def test_the_sampler_learns_the_loss_where_the_gradient_was_taken(network):
    for method in (SAM, PLAIN):
        theta = Theta(network)
        direction = replace(method, eta=0.05).start(MODEL)
        torch.manual_seed(0)
        direction(theta, DATA)
        (loss,) = [v for k, v in theta.trace.items() if k.startswith("nll/") and ("@1" in k) == bool(method.lam)]
        own = 0.5 * torch.exp(torch.tensor(0.05 * loss / 0.5, dtype=torch.float64))
        p = float(own / (own + 0.5))
        expected = p if drawn(theta) == "vulnerable" else 1 - p
        assert theta.trace["probability/vulnerable"] == pytest.approx(expected, rel=1e-9)


def run(method: VAA, steps: int = 40) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    how = Fit(steps=steps, lr=1e-3, seed=2)
    streams = {role: (lambda _, role=role: DATA[role]) for role in GROUPS}
    network = tiny.gpt2()
    fit(network, method.start(MODEL), streams, how, observe=lambda _, trace: rows.append(dict(trace)))
    return rows[1:]


def test_the_curriculum_follows_the_share_of_the_run_that_is_done():
    rows = run(VAA(), steps=60)
    perturbed = [any("@1" in key for key in row) for row in rows]
    assert not perturbed[0]
    assert sum(perturbed[:30]) < sum(perturbed[30:])
    assert sum(perturbed) / 60 == pytest.approx(0.5, abs=0.15)
    assert not any(any("@1" in key for key in row) for row in run(VAA(lam=0.0), steps=20))
    assert all(any("@1" in key for key in row) for row in run(SAM, steps=20))


def test_theta_is_told_its_share_of_the_run():
    told = []
    network = tiny.gpt2()

    def direction(theta, batch):
        told.append(theta.progress)
        return theta.grad(nll, batch["train"])

    fit(network, direction, {"train": lambda _: tiny.batch(2)}, Fit(steps=4, lr=1e-3))
    assert told == [0.0, 0.25, 0.5, 0.75]
    assert Theta(network).progress == 0.0


def test_in_a_run_it_moves_to_the_harder_group():
    """Both groups are the same kind of rows, but only one of them is learnt beforehand."""
    network = tiny.gpt2()
    fit(network, SFT().gradient, {"alignment": lambda _: DATA["alignment"]}, Fit(steps=150, lr=1e-2))
    easy, hard = (Theta(network).value(nll, DATA[role]) for role in GROUPS)
    assert hard > 2 * easy
    rows: list[dict[str, float]] = []
    direction = VAA(eta=0.02).start(MODEL)
    streams = {role: (lambda _, role=role: DATA[role]) for role in GROUPS}
    fit(network, direction, streams, Fit(steps=60, lr=1e-6), observe=lambda _, trace: rows.append(dict(trace)))
    assert rows[-1]["probability/vulnerable"] > 0.75


def test_micro_batches_change_nothing(network):
    whole, split = (stepped(SAM, Theta(network, micro_batch=m)) for m in (None, 1))
    assert (whole - split).norm() < 1e-11 * whole.norm()


def test_presets_and_what_is_declared():
    assert VAA.paper().floor == 0.0
    assert (VAA.released().floor, VAA.released().mean) == (0.1, "token")
    assert VAA().mechanisms == (LookAhead(steps=1, radius=0.4, rule="normalised"),)
    assert not VAA(rho=0.0).mechanisms
    assert not VAA(lam=0.0).mechanisms
    assert [p.where for p in VAA(rho=0.0, lam=0.0).problems(MODEL)] == ["rho", "lam"]
    assert not VAA().problems(MODEL)


@pytest.mark.parametrize(
    "settings", [{"rho": -1.0}, {"eta": -1.0}, {"lam": 1.5}, {"lam": -0.1}, {"floor": 0.5}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        VAA(**settings)
