"""DPO and IPO in two passes against autograd through the loss itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import slow
from immunity.batch import IGNORE, Batch
from immunity.errors import SettingsError
from immunity.losses import Loss
from immunity.preference import each, judged, log_prob, log_prob_per_token, margins, preferred
from immunity.reference import Reference
from immunity.testing import tiny
from immunity.theta import Theta

SAFE, HARMFUL = tiny.batch(4, seed=1, role="safe"), tiny.batch(4, seed=2, role="harmful")


def said(network: nn.Module, at: slow.Weights, batch: Batch, per: str) -> torch.Tensor:
    """log p of each response, one unpadded row at a time: [B]."""
    out = []
    for row in batch.rows:
        logits = torch.func.functional_call(network, at, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
        terms = [logits[t - 1, row.labels[t]] for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        out.append(sum(terms) / (len(terms) if per == "token" else 1))
    return torch.stack(out)


def oracle(network, before, kind: str, beta: float, per: str, weights: tuple[float, ...]) -> tuple[float, slow.Weights]:
    at = slow.weights(network)
    m = said(network, at, SAFE, per) - said(network, at, HARMFUL, per)
    if before is not None:
        base = slow.weights(before)
        m = m - (said(before, base, SAFE, per) - said(before, base, HARMFUL, per)).detach()
    terms = -torch.nn.functional.logsigmoid(beta * m) if kind == "dpo" else (m - 1 / (2 * beta)) ** 2
    w = torch.tensor(weights, dtype=torch.float64)
    total = (w * terms).sum() / w.sum()
    return float(total.detach()), slow.gradient(total, at)


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("per", ["response", "token"])
@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize("referred", [True, False])
def test_two_passes_equal_autograd(kind, per, micro, referred):
    before, network = tiny.gpt2(seed=1), tiny.gpt2(seed=0)
    theta, loss = Theta(network, micro_batch=micro), log_prob if per == "response" else log_prob_per_token
    known = margins(theta, SAFE, HARMFUL, Reference(before).at(loss)) if referred else ()
    got = preferred(theta, SAFE, HARMFUL, kind=kind, beta=0.3, per=per, before=known)
    value, want = oracle(network, before if referred else None, kind, 0.3, per, (1.0,) * 4)
    assert slow.relative_error(dict(zip(theta.names, got.tensors(), strict=True)), want) < 1e-12
    assert theta.trace[f"{kind}/safe"] == pytest.approx(value)
    assert theta.trace[f"{kind}/harmful"] == pytest.approx(value)


def test_the_weights_of_pairs_count():
    network, weights = tiny.gpt2(), (1.0, 0.0, 5.0, 2.0)
    theta = Theta(network, micro_batch=2)
    pairs = [Batch(rows.rows, rows.role, weights) for rows in (SAFE, HARMFUL)]
    got = preferred(theta, *pairs, beta=0.3)
    _, want = oracle(network, None, "dpo", 0.3, "response", weights)
    assert slow.relative_error(dict(zip(theta.names, got.tensors(), strict=True)), want) < 1e-12


def test_a_row_that_is_there_twice_keeps_a_slope_for_each_of_its_pairs():
    network, row = tiny.gpt2(), SAFE.rows[0]
    theta = Theta(network)
    chosen, rejected = Batch((row, row), "safe"), Batch(HARMFUL.rows[:2], "harmful")
    alone = [preferred(theta, Batch((row,)), Batch((other,)), beta=0.3) for other in rejected.rows]
    both = preferred(theta, chosen, rejected, beta=0.3)
    assert (both - 0.5 * (alone[0] + alone[1])).norm() < 1e-12 * both.norm()


def test_at_its_reference_every_margin_is_0_and_a_step_prefers_the_chosen():
    network = tiny.gpt2()
    theta, reference = Theta(network), Reference(network)
    known = margins(theta, SAFE, HARMFUL, reference.at(log_prob))
    assert margins(theta, SAFE, HARMFUL) == pytest.approx(known)
    g = preferred(theta, SAFE, HARMFUL, before=known)
    assert theta.trace["dpo/safe"] == pytest.approx(math.log(2))
    with theta.moved(-1e-2 * g.unit()):
        ahead = margins(theta, SAFE, HARMFUL)
    assert sum(ahead) > sum(known)
    assert margins(theta, SAFE, HARMFUL, reference.at(log_prob)) == pytest.approx(known)


def test_both_losses_are_their_closed_forms_and_stay_finite():
    m = [-3000.0, -2.0, 0.0, 5.0, 3000.0]
    found = judged("dpo", 0.5, m)
    wanted = [1500.0, math.log1p(math.e), math.log(2), math.log1p(math.exp(-2.5)), 0.0]
    assert found.values.tolist() == pytest.approx(wanted)
    assert found.slopes.tolist()[0] == pytest.approx(-0.5)
    assert found.slopes.tolist()[-1] == 0.0
    assert judged("ipo", 0.1, [5.0, 7.0]).values.tolist() == pytest.approx([0.0, 4.0])
    assert judged("ipo", 0.1, [5.0, 7.0]).slopes.tolist() == pytest.approx([0.0, 4.0])


@pytest.mark.parametrize("micro", [None, 2])
def test_values_come_row_by_row_in_order(micro):
    network = tiny.gpt2()
    found = each(Theta(network, micro_batch=micro), log_prob, SAFE)
    assert found == pytest.approx(said(network, slow.weights(network), SAFE, "response").tolist())


def test_what_is_no_pair_or_no_loss_is_refused():
    theta = Theta(tiny.gpt2())
    short = Batch(HARMFUL.rows[:3], "harmful")
    for bad in (
        lambda: preferred(theta, SAFE, short),
        lambda: preferred(theta, SAFE, Batch(HARMFUL.rows, "harmful", (1.0, 2.0, 3.0, 4.0))),
        lambda: preferred(theta, SAFE, HARMFUL, before=(0.0,)),
        lambda: preferred(theta, SAFE, HARMFUL, kind="other"),
        lambda: judged("dpo", 0.0, [1.0]),
        lambda: each(theta, Loss("both", log_prob.of, coupled=True), SAFE),
    ):
        with pytest.raises(SettingsError):
            bad()
