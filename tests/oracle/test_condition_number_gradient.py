"""Condition Number: the linear method against its theorem, the port against autograd over full outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

import slow
from immunity.batch import IGNORE
from immunity.conditioning import (
    Task,
    axes,
    condition,
    hessian,
    ill,
    ill_gradient,
    immunity_ratio,
    objective,
    preconditioned,
    spectrum,
    well,
    well_gradient,
)
from immunity.errors import SettingsError
from immunity.mechanisms import Conditioning
from immunity.methods.condition_number import ConditionNumber
from immunity.methods.sft import SFT
from immunity.testing import tiny
from immunity.theta import Theta

D = 6


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(seed: int) -> torch.Tensor:
    x = drawn(40, D, seed=seed) * torch.linspace(0.5, 2.0, D, dtype=torch.float64)
    return x.T @ x / 40


@pytest.mark.parametrize(("value", "closed"), [(well, well_gradient), (ill, ill_gradient)])
def test_closed_forms_equal_autograd(value, closed):
    for seed in range(5):
        weight, k = drawn(D, D, seed=seed).requires_grad_(), gram(seed)
        (wanted,) = torch.autograd.grad(value(hessian(weight, k)), weight)
        found = closed(weight.detach(), k)
        assert (found - wanted).norm() < 1e-10 * wanted.norm()


def test_a_rank_below_the_size_leaves_the_null_space_out():
    weight, k = drawn(D, D, seed=1), gram(1)
    weight[-1] = weight[0]  # rank D - 1
    h = hessian(weight, k)
    s = torch.linalg.svdvals(h)
    assert condition(h, D - 1) == pytest.approx(float(s[0] / s[D - 2]))
    assert float(ill(h, D - 1)) == pytest.approx(1.0 / float((s**2).sum() / (2 * (D - 1)) - s[D - 2] ** 2 / 2))
    weight = weight.requires_grad_()
    (wanted,) = torch.autograd.grad(ill(hessian(weight, k), D - 1), weight)
    assert (ill_gradient(weight.detach(), k, D - 1) - wanted).norm() < 1e-8 * wanted.norm()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=8), st.integers(0, 1000))
def test_the_penalties_are_what_they_are_said_to_be(eigenvalues, seed):
    q = torch.linalg.qr(drawn(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    s = q @ torch.diag(torch.tensor(sorted(eigenvalues), dtype=torch.float64)) @ q.T
    assert float(well(s)) >= -1e-9 * max(eigenvalues) ** 2
    assert float(ill(s)) > 0 or math.isinf(float(ill(s))) or max(eigenvalues) - min(eigenvalues) < 1e-3
    assert float(well(3.0 * torch.eye(4, dtype=torch.float64))) == pytest.approx(0.0, abs=1e-12)


def test_r_ill_falls_to_0_as_the_condition_number_rises():
    values = [float(ill(torch.diag(torch.tensor([k, 1.0, 1.0], dtype=torch.float64)))) for k in (2.0, 10.0, 1e3, 1e6)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-10


def moved(weight, k, gradient, side: str) -> float:
    """log kappa after a small step with K^-1 on one side, over what it was."""
    inverse = torch.linalg.inv(k)
    step = {"right": gradient @ inverse, "left": inverse @ gradient, "none": gradient}[side]
    eta = 1e-6 * float(weight.norm() / step.norm())
    return math.log(condition(hessian(weight - eta * step, k)) / condition(hessian(weight, k)))


def test_a_preconditioned_step_moves_kappa_the_proven_way_and_on_the_wrong_side_it_need_not():
    """Theorem 4.3, in 100 random cases; the released code multiplies from the left."""
    fell: dict[str, list[bool]] = {"right": [], "left": []}
    rose: dict[str, list[bool]] = {"right": [], "left": []}
    for seed in range(100):
        weight, k = drawn(D, D, seed=seed), gram(1000 + seed)
        for side in ("right", "left"):
            fell[side].append(moved(weight, k, well_gradient(weight, k), side) < 0)
            rose[side].append(moved(weight, k, ill_gradient(weight, k), side) > 0)
    assert all(fell["right"])
    assert all(rose["right"])
    assert not all(fell["left"]) or not all(rose["left"])


def test_the_dummy_layer_is_the_identity_and_multiplies_gradients_from_the_right():
    weight, k, g = drawn(4, D, seed=0).requires_grad_(), gram(0), drawn(4, D, seed=5)
    out = preconditioned(weight, k)
    assert torch.equal(out, weight)
    (found,) = torch.autograd.grad((out * g).sum(), weight)
    torch.testing.assert_close(found, g @ torch.linalg.inv(k))


def tasks() -> tuple[Task, torch.Tensor]:
    x, h = drawn(200, D, seed=1), drawn(200, D, seed=2) * torch.linspace(0.7, 1.4, D, dtype=torch.float64)
    return Task(x, x @ drawn(D, 2, seed=3)), h


def test_one_backward_pass_gives_the_papers_update():
    (x, y), h = tasks()
    weight, probe = drawn(D, D, seed=4).requires_grad_(), drawn(D, 2, seed=5).requires_grad_()
    objective(weight, probe, Task(x, y), h, lam_well=0.3, lam_ill=7.0).backward()
    error = 0.5 * (x @ weight.T @ probe - y).square().sum(1).mean()
    plain, of_probe = torch.autograd.grad(error, (weight, probe))
    w, p, q = weight.detach(), x.T @ x, h.T @ h
    wanted = plain + 0.3 * well_gradient(w, p) @ torch.linalg.inv(p) + 7.0 * ill_gradient(w, q) @ torch.linalg.inv(q)
    torch.testing.assert_close(weight.grad, wanted)
    torch.testing.assert_close(probe.grad, of_probe)
    with pytest.raises(SettingsError, match="no inverse"):
        objective(weight, probe, Task(x, y), h[:3], lam_well=1.0, lam_ill=1.0)


def immunised(steps: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(theta^T before, theta^T after, probe): gradient descent on the paper's objective."""
    kept, h = tasks()
    start = torch.eye(D, dtype=torch.float64) + 0.1 * drawn(D, D, seed=6)
    weight, probe = start.clone().requires_grad_(), torch.zeros(D, 2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([weight, probe], lr=5e-3)
    for _ in range(steps):
        opt.zero_grad()
        objective(weight, probe, kept, h, lam_well=1e-2, lam_ill=1e8).backward()
        opt.step()
    return start, weight.detach(), probe.detach()


def descents(h: torch.Tensor, target: float = 1e-6) -> int:
    """Steps of gradient descent with exact line search until a quadratic's error has fallen to ``target``."""
    b = torch.linalg.eigh(h).eigenvectors.sum(1)  # every direction has something to learn
    w, first = torch.zeros(len(h), dtype=h.dtype), float(b @ torch.linalg.solve(h, b)) / 2
    for step in range(20_000):
        if float(0.5 * w @ h @ w - b @ w) + first < target * first:
            return step
        r = b - h @ w
        w = w + (r @ r) / (r @ h @ r) * r
    return 20_000


def test_an_immunised_layer_learns_harm_slower_keeps_the_rest_and_whitening_undoes_it():
    (x, y), h = tasks()
    start, weight, probe = immunised()
    grams = {"kept": x.T @ x, "harmful": h.T @ h}
    before = {name: hessian(start, k) for name, k in grams.items()}
    after = {name: hessian(weight, k) for name, k in grams.items()}
    ratio = immunity_ratio(*(condition(m["harmful"]) for m in (after, before)), condition(after["kept"]),
                           condition(before["kept"]))  # fmt: skip
    assert ratio > 2.0
    assert descents(after["harmful"]) > 2 * descents(before["harmful"])
    assert descents(after["kept"]) <= descents(before["kept"])
    error = 0.5 * (x @ weight.T @ probe - y).square().sum(1).mean()
    assert float(error) < 0.05 * float(0.5 * y.square().sum(1).mean())
    s, v = torch.linalg.eigh(after["harmful"])
    whitening = (v / s.sqrt()) @ v.T
    assert condition(whitening @ after["harmful"] @ whitening) == pytest.approx(1.0)
    assert descents(whitening @ after["harmful"] @ whitening) <= 2


def test_the_ratio_of_a_model_to_itself_is_1():
    assert immunity_ratio(5.0, 5.0, 2.0, 2.0) == 1.0
    assert immunity_ratio(10.0, 5.0, 1.0, 2.0) == 4.0


def test_axes_are_those_of_both_clouds_whatever_their_size_and_length():
    a, b = torch.zeros(50, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    a[:, 0], b[:, 3] = 100.0, 1e-3
    along = axes(a, b, 2)
    assert sorted(along.abs().argmax(0).tolist()) == [0, 3]
    torch.testing.assert_close(along.T @ along, torch.eye(2, dtype=torch.float64))
    s = spectrum(drawn(30, 8, seed=1), torch.eye(8, dtype=torch.float64)[:, :5], 0.1)
    assert float(s.trace()) == pytest.approx(5 * 1.1)
    torch.testing.assert_close(spectrum(7 * a, along, 0.1), spectrum(a, along, 0.1))


DATA = {
    "alignment": tiny.batch(8, seed=1, role="alignment"),
    "harmful": tiny.batch(8, seed=2, role="harmful"),
}


@pytest.mark.parametrize(
    "method",
    [ConditionNumber(axes=4), ConditionNumber(lam=3.0, well=0.5, layers=(0.0, 1.0), head=False, axes=3)],
    ids=repr,
)
def test_the_port_equals_autograd_over_full_outputs(method):
    network = tiny.gpt2()
    theta, at = Theta(network), slow.weights(network)
    found = method.gradient(theta, DATA)
    clouds: dict[str, list[torch.Tensor]] = {}
    for role, batch in DATA.items():
        rows = []
        for row in batch.rows:
            out = functional_call(network, at, (torch.tensor([row.ids]),), {"output_hidden_states": True})
            asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
            # transformers norms what leaves the last block; undo it by asking for the states that enter the next one
            rows.append([state[0][asked] for state in out.hidden_states])
        clouds[role] = [torch.cat(part) for part in zip(*rows, strict=True)]
    raw = raw_last_block(network, at) if 1.0 in method.layers else None
    picked = [1 if layer == 0.0 else 2 for layer in method.layers if layer != 1.0]
    if method.layers == (0.5,):
        picked = [1]  # block 0 of two: round(0.5) is 0
    pairs = [(clouds["alignment"][i], clouds["harmful"][i]) for i in picked]
    pairs += [raw] if raw is not None else []
    pairs += [(clouds["alignment"][-1], clouds["harmful"][-1])] if method.head else []
    total = slow.mean_loss(network, at, DATA["alignment"])
    for a, b in pairs:
        along = axes(a.detach(), b.detach(), method.axes)
        s, h = spectrum(a, along, method.ridge), spectrum(b, along, method.ridge)
        total = total + method.lam / len(pairs) * (ill(h) + method.well * well(s))
    above = torch.autograd.grad(total, list(at.values()), materialize_grads=True)
    wanted = dict(zip(at, above, strict=True))
    got = dict(zip(theta.names, found.tensors(), strict=True))
    assert slow.relative_error(got, wanted) < 1e-8
    assert theta.trace["log10-condition/harmful"] > 0
    assert {"nll/alignment", "ill/harmful", "well/alignment"} <= set(theta.trace)


def raw_last_block(network, at) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last block before the final norm, at the tokens of answers."""
    found = []
    for batch in DATA.values():
        rows = []
        for row in batch.rows:
            seen: list[torch.Tensor] = []
            hook = network.transformer.h[-1].register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            functional_call(network, at, (torch.tensor([row.ids]),))
            hook.remove()
            asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
            rows.append(seen[0][0][asked])
        found.append(torch.cat(rows))
    return found[0], found[1]


def test_descending_makes_restricted_states_worse_conditioned_and_keeps_the_answers():
    network = tiny.gpt2()
    theta, method = Theta(network), ConditionNumber(axes=4, lam=1.0, well=0.1)
    first = None
    for _ in range(40):
        g = method.gradient(theta, DATA)
        first = first or theta.clear()
        theta.clear()
        theta.step(-0.02 * g)
    method.gradient(theta, DATA)
    last = {name.partition("@")[0]: value for name, value in theta.clear().items()}
    assert last["log10-condition/harmful"] > first["log10-condition/harmful"] + 0.1
    assert last["nll/alignment"] < first["nll/alignment"]


def test_at_strength_0_it_is_sft_and_says_so():
    model = tiny.language_model(tiny.gpt2())
    theta, method = Theta(model.network), ConditionNumber(lam=0.0)
    found, wanted = method.gradient(theta, DATA), SFT().gradient(theta, DATA)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), wanted.tensors(), strict=True))
    assert [problem.where for problem in method.problems(model)] == ["lam"]
    assert method.mechanisms == ()
    assert ConditionNumber().mechanisms == (Conditioning(),)


@pytest.mark.parametrize(
    "settings_",
    [{"lam": -1}, {"well": -1}, {"ridge": 0}, {"axes": 1}, {"layers": (2.0,)}, {"layers": (), "head": False}],
)
def test_settings_out_of_range_are_refused(settings_):
    with pytest.raises(SettingsError):
        replace(ConditionNumber(), **settings_)
