"""NPO against autograd over full logits on a two-layer float64 model, and what its paper says of the loss."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.losses import nll
from immunity.mechanisms import Conditioning, Unlearning
from immunity.methods.npo import NPO
from immunity.methods.sft import SFT
from immunity.preference import each, log_prob
from immunity.reference import Reference
from immunity.testing import tiny
from immunity.theta import Theta, Vector
from immunity.unlearning import Remembered, npo

DATA = {
    "alignment": tiny.batch(4, seed=1, role="alignment"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
}


@pytest.fixture
def model():
    return tiny.language_model(tiny.gpt2())


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def shifted(network: torch.nn.Module, by: float = 0.02) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(by * torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))


def row_nll(network, at, row: Tokens, *, mean: bool = False) -> torch.Tensor:
    logits = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0]
    asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    total = sum(-torch.log_softmax(logits[t - 1], dim=-1)[row.labels[t]] for t in asked)
    return total / len(asked) if mean else total


def oracle(before, network, method: NPO) -> slow.Weights:
    """Autograd of  CE + lam [-(2/beta) mean log sigma(beta (NLL - NLL_before)) + kl KL(before || now)]."""
    at = slow.weights(network)
    mean = method.per == "token"
    terms = []
    for row in DATA["harmful"].rows:
        with torch.no_grad():
            then = row_nll(before, slow.weights(before), row, mean=mean)
        ratio = torch.sigmoid(method.beta * (row_nll(network, at, row, mean=mean) - then))
        terms.append(-2.0 / method.beta * torch.log(ratio))
    divergences = []
    for row in DATA["alignment"].rows:
        q = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
        with torch.no_grad():
            p = before(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        divergences.append((p.exp() * (p - q)).sum(-1)[asked].mean())
    retain = slow.mean_loss(network, at, DATA["alignment"], mean=method.mean)
    extra = method.kl * sum(divergences) / len(divergences)
    return slow.gradient(retain + method.lam * (sum(terms) / len(terms) + extra), at)


@pytest.mark.parametrize(
    "method",
    [NPO(), NPO.released(), NPO(per="token", beta=2.0), NPO(lam=0.3, beta=1.0, kl=0.7)],
    ids=repr,
)
def test_the_gradient_equals_autograd_away_from_the_start(model, method):
    direction, before = method.start(model), copy.deepcopy(model.network)
    shifted(model.network)
    theta = Theta(model.network)
    wanted = oracle(before, model.network, method)
    assert slow.relative_error(named(theta, direction(theta, DATA)), wanted) < 1e-9


def test_at_the_start_the_loss_is_2_ln_2_over_beta_and_the_gradient_is_ascent(model):
    theta, rows = Theta(model.network), DATA["harmful"]
    for beta in (0.1, 1.0):
        g = theta.grad(npo(Remembered(Reference(model.network)), beta), rows)
        assert theta.trace["npo/harmful"] == pytest.approx(2.0 / beta * math.log(2.0), rel=1e-9)
        assert (g - theta.grad(log_prob, rows)).norm() < 1e-9 * g.norm()


@pytest.mark.parametrize("by", [-0.3, 0.05, 0.2])
def test_elsewhere_each_row_is_weighted_by_2_sigma_of_minus_beta_delta(model, by):
    before, beta = Reference(model.network), 0.5
    row = Batch(DATA["harmful"].rows[:1], "harmful")
    theta = Theta(model.network)
    theta.step(by * theta.grad(nll, row).unit())
    delta = each(theta, before.at(log_prob), row)[0] - each(theta, log_prob, row)[0]
    assert delta * by > 0  # downhill for log p is uphill for the loss
    g, ascent = theta.grad(npo(Remembered(before), beta), row), theta.grad(log_prob, row)
    ratio = 2.0 / (1.0 + math.exp(beta * delta))
    assert (g - ratio * ascent).norm() < 1e-9 * ascent.norm()


def test_towards_beta_0_it_is_ascent_wherever_it_stands(model):
    before = Reference(model.network)
    shifted(model.network, 0.1)
    theta, rows = Theta(model.network), DATA["harmful"]
    ascent = theta.grad(log_prob, rows)
    off = [(theta.grad(npo(Remembered(before), beta), rows) - ascent).norm() for beta in (1e-1, 1e-3, 1e-5)]
    assert off[0] > 10 * off[1] > 100 * off[2]
    assert off[2] < 1e-3 * ascent.norm()


def test_a_cached_reference_is_the_live_one_and_is_asked_once(model, monkeypatch):
    live, rows = Reference(model.network), DATA["harmful"]
    wanted = live.at(log_prob)(model.network, rows)
    before = Remembered(Reference(model.network))
    asked = []
    ask = before._before
    monkeypatch.setattr(before, "_before", lambda network, batch: asked.append(len(batch)) or ask(network, batch))
    shifted(model.network)
    for part in rows.split(2):
        before(model.network, part)
    again = before(model.network, rows)
    assert asked == [2, 1]
    torch.testing.assert_close(again, wanted, rtol=1e-10, atol=1e-10)
    other = Remembered(Reference(model.network))  # another point: only what was saved gives the same
    other.load_state_dict(before.state_dict())
    assert torch.equal(other(model.network, rows), again)
    twice = Batch((rows.rows[0], rows.rows[0]), "harmful")
    fresh = Remembered(live)
    assert fresh(model.network, twice).tolist() == [pytest.approx(float(wanted[0]))] * 2


def test_what_is_not_answer_does_not_count_and_a_batch_is_the_mean_of_its_rows(model):
    rows = DATA["harmful"]
    loss = npo(Remembered(Reference(model.network)))
    shifted(model.network)
    together = loss(model.network, rows)
    alone = torch.cat([loss(model.network, Batch((row,), "harmful")) for row in rows.rows])
    torch.testing.assert_close(together, alone)  # so pads of longer neighbours change nothing
    theta = Theta(model.network)
    whole = theta.grad(loss, rows)
    singles = [theta.grad(loss, Batch((row,), "harmful")) for row in rows.rows]
    assert (whole - (1 / 3) * (singles[0] + singles[1] + singles[2])).norm() < 1e-10 * whole.norm()


def test_a_sum_and_a_mean_differ_by_the_length_at_the_start(model):
    row = next(row for row in DATA["harmful"].rows if row.n_response > 1)
    batch, theta = Batch((row,), "harmful"), Theta(model.network)
    before = Reference(model.network)
    total = theta.grad(npo(Remembered(before)), batch)
    mean = theta.grad(npo(Remembered(before, "token")), batch)
    assert (total - row.n_response * mean).norm() < 1e-9 * total.norm()


def test_the_answer_gets_unlikely_and_stays_there_where_ascent_goes_on(model):
    start = copy.deepcopy(model.network)
    lost = {}
    for name in ("npo", "ascent"):
        theta = Theta(copy.deepcopy(start))
        loss = npo(Remembered(Reference(theta.network)), 1.0) if name == "npo" else log_prob
        met = []
        for _ in range(60):
            g = theta.grad(loss, DATA["harmful"]) + theta.grad(nll, DATA["alignment"])
            theta.step(-0.03 * g)
            met.append(theta.value(nll, DATA["harmful"]))
        lost[name] = (met[29], met[-1], theta.value(nll, DATA["alignment"]))
    first = Theta(start).value(nll, DATA["harmful"])
    middle, end, kept = lost["npo"]
    assert end > first + 0.5
    assert end - middle < 0.5 * (lost["ascent"][1] - lost["ascent"][0])
    assert end < lost["ascent"][1]
    assert kept < Theta(start).value(nll, DATA["alignment"])


def test_at_strength_0_it_is_sft_and_says_so(model):
    theta = Theta(model.network)
    for method, plain in ((NPO(lam=0.0, kl=1.0), SFT()), (replace(NPO.released(), lam=0.0), SFT(mean="token"))):
        found, wanted = method.start(model)(theta, DATA), plain.gradient(theta, DATA)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), wanted.tensors(), strict=True))
        assert [problem.where for problem in method.problems(model)] == ["lam"]
        assert method.mechanisms == ()
    assert NPO().mechanisms == (Unlearning(), Conditioning())


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"lam": -1.0}, {"kl": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError, match="must"):
        NPO(**settings)
    with pytest.raises(SettingsError, match="positive"):
        npo(Remembered(Reference(tiny.gpt2())), 0.0)
