"""Vaccine's and Targeted Vaccine's gradients against autograd through a GPT-2 by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

import slow
from immunity.batch import IGNORE
from immunity.hidden import Site, sites
from immunity.losses import nll
from immunity.methods.sft import SFT
from immunity.methods.targeted_vaccine import TargetedVaccine
from immunity.methods.vaccine import Vaccine
from immunity.testing import tiny
from immunity.theta import Theta
from immunity.transforms import drifted, site_norms
from test_hidden_gradient import forward

EPS = 1e-7
BATCH = {"alignment": tiny.batch(4, seed=1, role="alignment"), "harmful": tiny.batch(3, seed=2, role="harmful")}


def row_loss(network, row, added):
    """NLL of one unpadded row; ``added``: layer -> what is added to what attention gives there, [T, D]."""

    def edit(site, h):
        return h + added[site.layer] if site.where == "attention" and site.layer in added else h

    logs = torch.log_softmax(forward(network, torch.tensor(row.ids), edit), -1)
    asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    return -sum(logs[t - 1, row.labels[t]] for t in asked) / len(asked)


def felt(network, batch, layers, *, own):
    """For each row, layer -> ∂/∂ε at ε = 0: of the batch's weighted mean, or of the row's own loss."""
    found = []
    for row, weight in zip(batch.rows, batch.weights, strict=True):
        zeros = {layer: torch.zeros(len(row.ids), 16, dtype=torch.float64, requires_grad=True) for layer in layers}
        share = 1.0 if own else weight / sum(batch.weights)
        grads = torch.autograd.grad(share * row_loss(network, row, zeros), list(zeros.values()))
        found.append(dict(zip(layers, grads, strict=True)))
    return found


def length(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def epsilons(network, batch, rho, layers, scope):
    g = felt(network, batch, layers, own=scope == "per_example")
    if scope == "global":
        one = length(t for row in g for t in row.values())
        norms = [dict.fromkeys(layers, one) for _ in g]
    elif scope == "per_layer":
        each = {layer: length(row[layer] for row in g) for layer in layers}
        norms = [each for _ in g]
    else:
        norms = [dict.fromkeys(layers, length(row.values())) for row in g]
    return [{at: rho * g[i][at] / (norms[i][at] + EPS) for at in layers} for i in range(len(g))]


def second_pass(network, batch, added):
    values = [row_loss(network, row, e) for row, e in zip(batch.rows, added, strict=True)]
    total = sum(w * v for w, v in zip(batch.weights, values, strict=True)) / sum(batch.weights)
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, [network.get_parameter(name) for name in names])
    return dict(zip(names, grads, strict=True)), float(total.detach())


def named(theta, vector):
    return dict(zip(theta.names, vector.tensors(), strict=True))


@pytest.fixture
def network():
    return tiny.gpt2()


@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("scope", ["global", "per_example", "per_layer"])
@pytest.mark.parametrize("mean", ["example", "token"])
def test_the_gradient_is_that_of_a_constant_added_by_hand(network, scope, layers, mean):
    batch = BATCH["alignment"].by_tokens() if mean == "token" else BATCH["alignment"]
    rho = 0.7
    want, value = second_pass(network, batch, epsilons(network, batch, rho, layers, scope))
    theta = Theta(network)
    loss = drifted(nll, rho, sites(network, "attention", layers), norm_scope=scope)
    assert slow.relative_error(named(theta, theta.grad(loss, batch)), want) < 1e-12
    assert theta.trace == {"drifted-nll/alignment": pytest.approx(value, rel=1e-12)}
    assert loss.coupled == (scope != "per_example")
    plain = named(theta, theta.grad(nll, batch))
    assert slow.relative_error(plain, want) > 0.01  # the oracle can tell


@pytest.mark.parametrize("method", [Vaccine.paper(), Vaccine.released(), Vaccine(norm_scope="per_layer")], ids=repr)
def test_vaccine_is_the_drifted_loss_at_every_attention(network, method):
    batch = BATCH["alignment"].by_tokens() if method.mean == "token" else BATCH["alignment"]
    want, _ = second_pass(network, batch, epsilons(network, batch, method.rho, (0, 1), method.norm_scope))
    theta = Theta(network)
    assert slow.relative_error(named(theta, method.gradient(theta, BATCH)), want) < 1e-12


def test_epsilon_is_a_constant_in_the_second_pass(network):
    """Differentiating through it gives another vector: what the method does not do, and the oracle could tell."""
    batch = BATCH["alignment"]
    zeros = [
        {at: torch.zeros(len(row.ids), 16, dtype=torch.float64, requires_grad=True) for at in (0, 1)}
        for row in batch.rows
    ]
    flat = [t for row in zeros for t in row.values()]
    first = sum(row_loss(network, row, e) for row, e in zip(batch.rows, zeros, strict=True)) / len(batch)
    g = torch.autograd.grad(first, flat, create_graph=True)
    norm = torch.sqrt(sum(t.square().sum() for t in g))
    live = [{at: 0.7 * g[2 * i + at] / norm for at in (0, 1)} for i in range(len(batch))]
    through, _ = second_pass(network, batch, live)
    theta = Theta(network)
    mine = named(theta, theta.grad(drifted(nll, 0.7, sites(network, "attention")), batch))
    assert slow.relative_error(mine, through) > 0.01


def test_to_first_order_the_loss_rises_by_rho_times_the_norm(network):
    batch, places = BATCH["alignment"], sites(network, "attention")
    theta = Theta(network)
    plain = theta.value(nll, batch)
    slope = length(t for row in felt(network, batch, (0, 1), own=False) for t in row.values())
    for rho in (1e-3, 1e-4):
        rise = (theta.value(drifted(nll, rho, places), batch) - plain) / rho
        assert rise == pytest.approx(slope, rel=10 * rho)


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_norms_at_sites_are_those_by_hand_whatever_the_micro_batch(network, micro, by_tokens):
    batch = BATCH["harmful"].by_tokens() if by_tokens else BATCH["harmful"]
    by_hand = felt(network, batch, (0, 1), own=False)
    found = site_norms(Theta(network, micro_batch=micro), nll, batch, sites(network, "attention"))
    for layer in (0, 1):
        assert found[Site(layer, "attention")] == pytest.approx(length(row[layer] for row in by_hand), rel=1e-12)


def drawing(method, network, odds, drawn, done=1):
    """A direction in the midst of a run."""
    along = method.start(tiny.language_model(network))
    along.load_state_dict({"done": done, "odds": odds, "drawn": drawn})
    return along


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("drawn", [[0], [1], [0, 1]], ids=str)
def test_targeted_vaccine_drifts_the_drawn_by_a_norm_of_their_own_and_freezes_the_rest(network, drawn, mean):
    batch = BATCH["alignment"].by_tokens() if mean == "token" else BATCH["alignment"]
    method, theta = TargetedVaccine(gamma=1, mean=mean), Theta(network)
    found = drawing(method, network, [0.5, 0.5], drawn)(theta, BATCH)
    want, _ = second_pass(network, batch, epsilons(network, batch, method.rho, drawn, "global"))
    inside = {name for name in theta.names if name.startswith(tuple(f"transformer.h.{at}." for at in drawn))}
    got = named(theta, found)
    assert slow.relative_error({n: got[n] for n in inside}, {n: want[n] for n in inside}) < 1e-12
    assert {name for name in theta.names if not got[name].any()} == set(theta.names) - inside
    assert {theta.names[i] for i in found.still} == set(theta.names) - inside


def test_odds_are_shares_of_the_norms_of_the_harmful_batch(network):
    theta, along = Theta(network), TargetedVaccine(gamma=1).start(tiny.language_model(network))
    along(theta, BATCH)
    rows = felt(network, BATCH["harmful"], (0, 1), own=False)
    norms = [length(row[layer] for row in rows) for layer in (0, 1)]
    assert along.odds == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-12)
    assert theta.trace["nll/harmful"] > 0


def test_with_rho_0_the_drawn_blocks_get_sfts_gradient_bit_for_bit(network):
    theta = Theta(network)
    plain = named(theta, SFT().gradient(theta, BATCH))
    got = named(theta, drawing(TargetedVaccine(rho=0.0), network, [0.5, 0.5], [1])(theta, BATCH))
    for name in theta.names:
        inside = name.startswith("transformer.h.1.")
        assert torch.equal(got[name], plain[name] if inside else torch.zeros_like(plain[name]))
    assert Vaccine(rho=0.0).gradient(theta, BATCH).norm() == SFT().gradient(theta, BATCH).norm()
