"""Bounded losses: closed forms of values and gradients, and where each gradient ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from immunity import losses
from immunity.batch import IGNORE, Batch, Tokens
from immunity.bounded import clamped, head_size, inverse_ce, negative_entropy, uniform, wide
from immunity.errors import SettingsError
from immunity.losses import Loss
from immunity.testing import tiny
from immunity.theta import Theta

V = 10


class Head(nn.Module):
    """A "model" whose logits at position t are row t of one table: a loss's gradient is that of its logits."""

    class Config:
        vocab_size = V

        def get_text_config(self):
            return self

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.double())
        self.config, self.base_model = self.Config(), self._states
        self.head = nn.Identity()
        self.head.weight = torch.zeros(V, V)

    def _states(self, input_ids, attention_mask, use_cache):
        class Out:
            last_hidden_state = self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1)

        return Out()

    def get_output_embeddings(self):
        return self.head


def one(target: int = 3) -> Batch:
    return Batch((Tokens((1, target), (IGNORE, target)),))


def at(logits: list[float] | torch.Tensor, loss: Loss, target: int = 3) -> tuple[float, torch.Tensor]:
    """Value and gradient of a loss where the only response position has these logits."""
    network = Head(torch.stack([torch.as_tensor(logits, dtype=torch.float64), torch.zeros(V).double()]))
    value = loss(network, one(target))
    value.sum().backward()
    return float(value.detach()), network.table.grad[0]


def gap(size: float, target: int = 3) -> torch.Tensor:
    """Logits of a model that is certain of a token: all others lie ``size`` below."""
    return torch.eye(V, dtype=torch.float64)[target] * size


LOGITS = st.lists(st.floats(-6, 6), min_size=V, max_size=V)


@given(LOGITS)
def test_values_are_the_closed_forms(z):
    p = torch.tensor(z, dtype=torch.float64).softmax(0)
    pairs = {
        clamped(): -min(-math.log(p[3]), math.log(V)),
        clamped(0.5): -min(-math.log(p[3]), 0.5),
        negative_entropy(): float((p * p.log()).sum()),
        uniform: float((1 / V * (1 / V / p).log()).sum()),
        inverse_ce("paper"): -math.log1p(-float(p[3])),
        inverse_ce("released"): -math.log(torch.tensor(z, dtype=torch.float64).neg().softmax(0)[3]),
    }
    for loss, wanted in pairs.items():
        assert at(z, loss)[0] == pytest.approx(wanted, abs=1e-9, rel=1e-7), loss.name


@given(LOGITS)
def test_the_gradient_of_uniform_is_p_minus_one_over_v(z):
    p = torch.tensor(z, dtype=torch.float64).softmax(0)
    assert torch.allclose(at(z, uniform)[1], p - 1 / V, atol=1e-12)


def test_at_uniform_logits_uniform_is_0_with_gradient_0_and_the_entropy_at_its_floor():
    for loss, floor in ((uniform, 0.0), (negative_entropy(), -math.log(V))):
        value, gradient = at(torch.full((V,), 1.7), loss)
        assert value == pytest.approx(floor, abs=1e-12)
        assert float(gradient.abs().max()) < 1e-12


def test_where_the_model_is_certain_the_entropy_has_no_gradient_and_uniform_has():
    entropy, flat = (float(at(gap(20.0), loss)[1].norm()) for loss in (negative_entropy(), uniform))
    assert entropy < 1e-6
    assert flat > 0.9


@pytest.mark.parametrize("per", ["token", "example"])
def test_above_its_ceiling_a_clamped_loss_has_no_gradient_and_below_it_the_cross_entropys(per):
    known, unknown = gap(2.0), gap(20.0, target=5)  # of the second the cross-entropy is 20, above ln 10
    _, gradient = at(known, clamped(per=per))
    assert torch.allclose(gradient, torch.eye(V, dtype=torch.float64)[3] - known.softmax(0))
    value, gradient = at(unknown, clamped(per=per))
    assert value == pytest.approx(-math.log(V))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_per_token_a_hard_token_does_not_shield_an_easy_one():
    network = Head(torch.stack([gap(20.0, 5), gap(2.0), torch.zeros(V)]))
    rows = Batch((Tokens((1, 3, 3), (IGNORE, 3, 3)),))  # the first is above the ceiling, and so is the mean
    for per, moved in (("token", True), ("example", False)):
        network.table.grad = None
        clamped(per=per)(network, rows).sum().backward()
        assert not network.table.grad[0].any()
        assert bool(network.table.grad[1].any()) == moved


def test_the_two_inverse_cross_entropies_are_different_losses():
    z = torch.randn(V, generator=torch.Generator().manual_seed(0))
    (paper, a), (released, b) = (at(z, inverse_ce(form)) for form in ("paper", "released"))
    assert abs(paper - released) > 0.5
    assert float(torch.cosine_similarity(a, b, dim=0)) < 0.95


def test_the_papers_inverse_cross_entropy_stays_finite_at_both_ends_and_is_cut_off():
    value, gradient = at(gap(800.0), inverse_ce())  # 1 - p rounds to 0 here
    assert value == pytest.approx(800.0 - math.log(V - 1))
    assert float(gradient.norm()) < 1.5
    for far, nonzero in ((14.0, True), (16.0, False)):
        value, gradient = at(gap(far, target=5), inverse_ce())  # log p of token 3 is about -far
        assert bool(value) == nonzero
        assert bool(gradient.any()) == nonzero
        assert bool(gradient.isfinite().all())


ALL = [
    clamped(),
    clamped(per="example"),
    clamped(4.3),
    negative_entropy(),
    negative_entropy(20),
    uniform,
    inverse_ce(),
    inverse_ce("released"),
]


@pytest.mark.parametrize("loss", ALL, ids=lambda one: one.name)
def test_chunks_over_the_vocabulary_and_micro_batches_change_nothing(loss, monkeypatch):
    network, rows = tiny.gpt2(), tiny.batch(5)
    whole = Theta(network).grad(loss, rows)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 3 * tiny.SMALL_VOCAB)
    for theta in (Theta(network), Theta(network, micro_batch=2)):
        assert (theta.grad(loss, rows) - whole).norm() < 1e-12 * whole.norm()


@pytest.mark.parametrize("loss", ALL, ids=lambda one: one.name)
def test_gradients_are_those_of_finite_differences(loss):
    network, rows = tiny.gpt2(), tiny.batch(3)
    theta = Theta(network)
    g = theta.grad(loss, rows)
    step = 1e-6 * g.unit()
    with theta.moved(step):
        ahead = theta.value(loss, rows)
    with theta.moved(-step):
        behind = theta.value(loss, rows)
    assert (ahead - behind) / 2e-6 == pytest.approx(g.norm(), rel=1e-5)


def test_a_descent_of_each_raises_the_loss_of_the_answer_or_of_certainty():
    for loss in (clamped(), negative_entropy(), uniform, inverse_ce(), inverse_ce("released")):
        network, rows = tiny.gpt2(), tiny.batch(4)
        theta = Theta(network)
        probed = negative_entropy() if loss.name in {"negative-entropy", "kl-from-uniform"} else losses.nll
        sign = -1 if probed.name == "negative-entropy" else 1
        before = theta.value(probed, rows)
        with theta.moved(-1e-3 * theta.grad(loss, rows).unit()):
            assert sign * (theta.value(probed, rows) - before) > 0, loss.name


def test_with_a_width_the_entropy_is_the_plain_mean_over_all_positions():
    network, rows, width = tiny.gpt2(), tiny.batch(4), 18
    ids, mask, _ = wide(rows, width)
    assert ids.shape == (4, width)
    logits = network(input_ids=ids, attention_mask=mask).logits
    wanted = (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert Theta(network).value(negative_entropy(width), rows) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert abs(Theta(network).value(negative_entropy(), rows) - float(wanted.detach())) > 1e-4


def test_without_one_pads_and_prompts_do_not_count():
    network, rows = tiny.gpt2(), tiny.batch(4)
    alone = [float(negative_entropy()(network, Batch((row,))).detach()) for row in rows.rows]
    assert negative_entropy()(network, rows).tolist() == pytest.approx(alone)


def test_what_is_out_of_range_is_refused():
    for bad in (lambda: clamped(0.0), lambda: clamped(-1.0), lambda: inverse_ce("other")):
        with pytest.raises(SettingsError):
            bad()
    with pytest.raises(SettingsError, match="width 3"):
        negative_entropy(3)(tiny.gpt2(), tiny.batch(2))


def test_the_head_counts_the_vocabulary():
    assert head_size(tiny.gpt2()) == tiny.SMALL_VOCAB
