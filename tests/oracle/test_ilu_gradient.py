"""ILU against double backward on a two-layer float64 model: its three readings, and the unlearning under it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import PrecisionError, SettingsError
from immunity.hidden import Site
from immunity.invariance import logit_slope, penalty
from immunity.losses import nll
from immunity.mechanisms import Conditioning, Representation, Unlearning
from immunity.methods.ilu import ILU
from immunity.reference import Reference
from immunity.testing import tiny
from immunity.theta import Theta, Vector
from immunity.unlearning import Remembered, held, npo, steered

DATA = {
    "alignment": tiny.batch(4, seed=1, role="alignment"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
    "benign": tiny.batch(6, seed=3, role="benign"),
}
BENIGN = DATA["benign"]
HALVES = BENIGN.parts(2)


@pytest.fixture
def model():
    return tiny.language_model(tiny.gpt2())


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def scaled_loss(network, at, batch: Batch, w: torch.Tensor) -> torch.Tensor:
    """The mean loss with logits w z."""
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        z = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0]
        asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        total = total + sum(-torch.log_softmax(w * z[t - 1], dim=-1)[row.labels[t]] for t in asked) / len(asked)
    return total / len(batch)


def slope(network, at, batch: Batch, reading: str) -> torch.Tensor:
    """r, with its graph."""
    if reading == "logits":
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(scaled_loss(network, at, batch, w), w, create_graph=True)[0]
    g = slow.gradient(slow.mean_loss(network, at, batch), at, graph=True)
    return sum((at[n] * g[n]).sum() for n in at)


def oracle(network, batches, reading: str) -> tuple[float, slow.Weights]:
    at = slow.weights(network)
    if reading == "gradient":
        gs = [slow.gradient(slow.mean_loss(network, at, b), at, graph=True) for b in batches]
        value = sum((gs[0][n] * gs[-1][n]).sum() for n in at)
    else:
        rs = [slope(network, at, b, reading) for b in batches]
        value = rs[0] * rs[-1]
    return float(value.detach()), slow.gradient(value, at)


@pytest.mark.parametrize("batches", [(BENIGN,), HALVES], ids=["square", "halves"])
@pytest.mark.parametrize(("reading", "within"), [("logits", 1e-9), ("weights", 1e-6), ("gradient", 1e-6)])
def test_the_penalty_equals_double_backward(model, reading, batches, within):
    theta = Theta(model.network)
    found = penalty(theta, batches, reading)
    value, wanted = oracle(model.network, batches, reading)
    assert theta.trace["invariance/benign"] == pytest.approx(value, rel=1e-8)
    assert slow.relative_error(named(theta, found), wanted) < within


@pytest.mark.parametrize("reading", ["weights", "gradient"])
def test_differences_of_gradients_are_good_in_single_precision_too(reading):
    network = tiny.gpt2(torch.float32)
    found = penalty(Theta(network), (BENIGN,), reading)
    _, wanted = oracle(tiny.gpt2(), (BENIGN,), reading)
    got = {n: t.double() for n, t in named(Theta(network), found).items()}
    assert slow.relative_error(got, wanted) < 1e-2


def test_under_autocast_only_the_closed_form_is_there():
    theta = Theta(tiny.gpt2(torch.float32), autocast=torch.bfloat16)
    assert penalty(theta, (BENIGN,)).norm() > 0
    for reading in ("weights", "gradient"):
        with pytest.raises(PrecisionError, match="bf16"):
            penalty(theta, (BENIGN,), reading)
    with pytest.raises(SettingsError, match="one batch or two"):
        penalty(theta, (), "logits")


def test_the_slope_is_the_derivative_of_the_loss_by_the_temperature(model):
    at, eps = slow.weights(model.network), 1e-5
    ends = [scaled_loss(model.network, at, BENIGN, torch.tensor(1.0 + s, dtype=torch.float64)) for s in (eps, -eps)]
    wanted = float((ends[0] - ends[1]).detach()) / (2 * eps)
    assert Theta(model.network).value(logit_slope, BENIGN) == pytest.approx(wanted, rel=1e-6)


def test_the_slope_of_weights_is_the_derivative_of_the_loss_by_their_scale(model):
    theta, eps = Theta(model.network), 1e-5
    penalty(theta, (BENIGN,), "weights")
    ends = []
    here = Vector([p.detach().clone() for p in theta.parameters])
    for sign in (1.0, -1.0):
        with theta.moved(sign * eps * here):
            ends.append(theta.value(nll, BENIGN))
    r = (ends[0] - ends[1]) / (2 * eps)
    assert theta.trace["invariance/benign"] == pytest.approx(r * r, rel=1e-6)


def test_the_slope_is_0_at_the_best_temperature(model):
    """Logits w z with w chosen to minimise the loss: nothing is gained by a scale any more."""
    head = model.network.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied, so that only logits are scaled
    first, theta = float(Theta(model.network).value(logit_slope, BENIGN)), Theta(model.network)
    low, high = 0.0, 4.0
    home = head.weight.detach().clone()
    for _ in range(60):
        middle = (low + high) / 2
        with torch.no_grad():
            head.weight.copy_(middle * home)
        low, high = (low, middle) if theta.value(logit_slope, BENIGN) > 0 else (middle, high)
    assert abs(theta.value(logit_slope, BENIGN)) < 1e-9 < abs(first)
    assert penalty(theta, (BENIGN,)).norm() < 1e-8


def test_what_is_not_answer_does_not_count(model):
    row = BENIGN.rows[0]
    longer = Batch((row, Tokens(row.ids + row.ids, row.labels + row.labels)), "benign")
    alone = logit_slope(model.network, Batch((row,), "benign"))
    torch.testing.assert_close(logit_slope(model.network, longer)[:1], alone)


def test_the_product_over_two_batches_is_unbiased_and_the_square_is_not(model):
    rows = tiny.batch(40, seed=9)
    slopes = logit_slope(model.network, rows).detach()
    whole = float(slopes.mean()) ** 2
    draws = [torch.randperm(40, generator=torch.Generator().manual_seed(i))[:4] for i in range(4000)]
    halves = torch.stack([slopes[d[:2]].mean() * slopes[d[2:]].mean() for d in draws])
    squares = torch.stack([slopes[d].mean() ** 2 for d in draws])
    error = float(halves.std()) / 4000**0.5
    # Without replacement: E[r1 r2] is the mean over unequal pairs, a hair below the square of the mean.
    exact = whole - float(slopes.var()) / 40
    assert abs(float(halves.mean()) - exact) < 4 * error
    assert float(squares.mean()) - whole > 10 * error


def unlearning(before, network, at, method: ILU) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in DATA["harmful"].rows:

        def nats(net, weights, row=row):
            z = functional_call(net, weights, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
            return -sum(z[t - 1, row.labels[t]] for t in range(1, len(row.ids)) if row.labels[t] != IGNORE)

        delta = nats(network, at) - nats(before, slow.weights(before)).detach()
        total = total - 2.0 / method.beta * torch.nn.functional.logsigmoid(method.beta * delta) / 3
    return total + method.gamma * slow.mean_loss(network, at, DATA["alignment"])


@pytest.mark.parametrize(
    "method",
    [ILU(lam=0.5), ILU(lam=0.5, estimate="halves", gamma=0.3, beta=1.0), ILU(lam=0.0)],
    ids=repr,
)
def test_on_npo_it_is_the_unlearning_and_the_penalty(model, method):
    direction, before = method.start(model), copy.deepcopy(model.network)
    with torch.no_grad():
        for p in model.network.parameters():
            p.mul_(1.02)
    theta = Theta(model.network)
    at = slow.weights(model.network)
    wanted = slow.gradient(unlearning(before, model.network, at, method), at)
    if method.lam:
        _, more = oracle(model.network, HALVES if method.estimate == "halves" else (BENIGN,), "logits")
        wanted = slow.combine((1.0, wanted), (method.lam, more))
    assert slow.relative_error(named(theta, direction(theta, DATA)), wanted) < 1e-9


def test_without_the_penalty_it_is_the_unlearning_bit_for_bit_and_says_so(model):
    theta = Theta(model.network)
    method = ILU(lam=0.0)
    before = Remembered(Reference(model.network))
    plain = theta.grad(npo(before), DATA["harmful"]) + theta.grad(nll, DATA["alignment"])
    found = method.start(model)(theta, DATA)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), plain.tensors(), strict=True))
    assert [problem.where for problem in method.problems(model)] == ["lam"]
    assert ILU().problems(model) == []


def test_rmu_leads_restricted_states_to_a_point_and_holds_the_others(model):
    method = replace(ILU.rmu(), lam=0.0, gamma=2.0, depth=0.0, push=3.0)
    reference, before = Reference(model.network), copy.deepcopy(model.network)
    with torch.no_grad():
        for p in model.network.parameters():
            p.mul_(1.05)
    theta, at = Theta(model.network), slow.weights(model.network)
    u = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    goal = 3.0 * u / u.norm()

    def states(network, weights, row):
        out = functional_call(network, weights, (torch.tensor([row.ids]),), {"output_hidden_states": True})
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        return out.hidden_states[1][0][asked]

    led = sum((states(model.network, at, row) - goal).square().mean() for row in DATA["harmful"].rows) / 3
    kept = [
        (states(model.network, at, row) - states(before, slow.weights(before), row).detach()).square().mean()
        for row in DATA["alignment"].rows
    ]
    total = led + 2.0 * sum(kept) / 4
    above = torch.autograd.grad(total, list(at.values()), materialize_grads=True)  # 0 above the block
    wanted = dict(zip(at, above, strict=True))
    place = Site(0, "output")
    found = theta.grad(steered(place, 3.0), DATA["harmful"]) + 2.0 * theta.grad(
        held(reference, place), DATA["alignment"]
    )
    assert slow.relative_error(named(theta, found), {n: wanted[n] for n in theta.names}) < 1e-9
    assert method.mechanisms == (Unlearning(), Conditioning(), Representation(layers="first-half"))
    assert ILU().mechanisms == (Unlearning(), Conditioning())


def test_the_slope_falls_on_honest_data_while_restricted_answers_are_forgotten(model):
    theta, method = Theta(model.network), ILU(lam=5.0, beta=1.0)
    direction = method.start(model)
    first = [theta.value(logit_slope, BENIGN), theta.value(nll, DATA["harmful"]), theta.value(nll, DATA["alignment"])]
    for _ in range(200):
        theta.step(-0.005 * direction(theta, DATA))
    last = [theta.value(logit_slope, BENIGN), theta.value(nll, DATA["harmful"]), theta.value(nll, DATA["alignment"])]
    assert abs(last[0]) < 0.1 * abs(first[0])
    assert last[1] > first[1] + 0.5
    assert last[2] < first[2]


@pytest.mark.parametrize("settings", [{"lam": -1}, {"gamma": -1}, {"beta": 0}, {"push": 0}, {"depth": 1.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        ILU(**settings)
