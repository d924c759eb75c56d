"""SEAM's gradient against double backward on a two-layer float64 model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.coupling import cosine, cosine_gradient, expected_survival, survival
from immunity.early import every_depth, final_norm
from immunity.errors import PrecisionError, SettingsError
from immunity.losses import nll
from immunity.mechanisms import Collapse, GradientCoupling, Unlearning
from immunity.methods.seam import SEAM
from immunity.methods.sft import SFT
from immunity.testing import tiny
from immunity.theta import Theta, Vector

DATA = {
    "alignment": tiny.batch(4, seed=1, role="alignment"),
    "safe": tiny.batch(3, seed=5, role="safe"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
    "general": tiny.batch(3, seed=3, role="general"),
}


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def flat(found: slow.Weights) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in found.values()])


def kept(row: Tokens, beside: Tokens) -> Tokens:
    """The released mask, position by position; pads differ from everything."""
    n = max(len(row.ids), len(beside.ids))
    one, two = ([*r.ids, *[-1 - k] * (n - len(r.ids))] for k, r in enumerate((row, beside)))
    mask = [a != b for a, b in zip(one, two, strict=True)]
    seen = [t for t in range(1, len(row.ids)) if mask[t] and mask[t - 1] and row.labels[t] != IGNORE]
    return Tokens(row.ids, tuple(i if t in seen else IGNORE for t, i in enumerate(row.ids))) if seen else row


def labelled(method: SEAM) -> dict[str, Batch]:
    if method.labels == "response":
        return DATA
    pairs = list(zip(DATA["harmful"].rows, DATA["safe"].rows, strict=True))
    return {
        "harmful": Batch(tuple(kept(h, s) for h, s in pairs), "harmful"),
        "safe": Batch(tuple(kept(s, h) for h, s in pairs), "safe"),
        "general": Batch(tuple(Tokens(row.ids, row.ids) for row in DATA["general"].rows), "general"),
    }


def loss_at_depths(network, at: slow.Weights, batch: Batch, mean: str) -> torch.Tensor:
    """(CE + sum_j CE_j)/(L + 1) through transformers' own hidden states, one unpadded row at a time."""
    total, rows, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    head, scale, shift = (at[f"transformer.{n}"] for n in ("wte.weight", "ln_f.weight", "ln_f.bias"))
    for row in batch.rows:
        seen = functional_call(network, at, (torch.tensor([row.ids]),), {"output_hidden_states": True})
        normed = [torch.nn.functional.layer_norm(h[0], h.shape[-1:], scale, shift, 1e-5) for h in seen.hidden_states]
        scores = [seen.logits[0], *(h @ head.T for h in normed)]
        asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        terms = [-sum(torch.log_softmax(z[t - 1], -1)[row.labels[t]] for z in scores) for t in asked]
        total = total + (sum(terms) / len(terms) if mean == "example" else sum(terms))
        rows, tokens = rows + 1, tokens + len(terms)
    return total / (rows if mean == "example" else tokens) / len(normed)


def oracle(network, method: SEAM) -> slow.Weights:
    """Autograd of  alpha l(up) - log(1 + CE(harm)) + beta cos(grad l(harm), grad l(general))."""
    at, data = slow.weights(network), labelled(method)
    total = method.alpha * slow.mean_loss(network, at, data[method.utility], mean=method.mean)
    harmful = slow.mean_loss(network, at, data["harmful"], mean=method.mean)
    if method.unlearn != "none":
        by_depth = method.unlearn == "depths"
        lost = loss_at_depths(network, at, data["harmful"], method.mean) if by_depth else harmful
        total = total - torch.log(1 + lost)
    a = flat(slow.gradient(harmful, at, graph=True))
    b = flat(slow.gradient(slow.mean_loss(network, at, data["general"], mean=method.mean), at, graph=True))
    return slow.gradient(total + method.beta * (a @ b) / (a.norm() * b.norm()), at)


OPEN = {"ceiling": "none", "beta": 3.0}  # so large that the cosine is most of it


@pytest.mark.parametrize(
    ("method", "within"),
    [
        (SEAM(eps=1e-5, **OPEN), 1e-4),
        (SEAM(eps=1e-4, difference="central", **OPEN), 1e-6),
        (replace(SEAM.paper(), eps=1e-5, beta=3.0), 1e-4),
        (replace(SEAM.paper(), eps=1e-4, difference="central", beta=3.0), 1e-6),
        (replace(SEAM.released(), eps=1e-4, difference="central", beta=3.0), 1e-6),
        (SEAM(eps=1e-4, unlearn="none", mean="token", difference="central", beta=3.0), 1e-6),
        (replace(SEAM.released(), eps=1e-4), 1e-5),
    ],
    ids=repr,
)
def test_the_whole_gradient_equals_double_backward(network, method, within):
    theta = Theta(network)
    want = oracle(network, method)
    assert slow.relative_error(named(theta, method.gradient(theta, DATA)), want) < within
    # The oracle can tell: without the cosine it is another vector.
    silent = replace(method, beta=0.0)
    assert slow.relative_error(named(theta, silent.gradient(theta, DATA)), want) > 100 * within


def estimate(theta: Theta, eps: float, difference: str) -> Vector:
    rows = (DATA["harmful"], DATA["general"])
    at = tuple(theta.grad(nll, part) for part in rows)
    return cosine_gradient(theta, nll, rows, at, eps=eps, difference=difference)


def exact(network) -> slow.Weights:
    at = slow.weights(network)
    a, b = (
        flat(slow.gradient(slow.mean_loss(network, at, DATA[role]), at, graph=True)) for role in ("harmful", "general")
    )
    return slow.gradient((a @ b) / (a.norm() * b.norm()), at)


@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
def test_the_error_of_the_cosine_falls_like_its_power_of_eps(network, difference, order):
    theta, want = Theta(network), exact(network)
    errors = [slow.relative_error(named(theta, estimate(theta, eps, difference)), want) for eps in (4e-3, 2e-3, 1e-3)]
    assert errors[-1] < (1e-2 if order == 1 else 1e-3)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_the_weights_are_restored_bit_for_bit_and_the_cosine_is_logged(network):
    theta = Theta(network)
    before = [p.detach().clone() for p in theta.parameters]
    SEAM().gradient(theta, DATA)
    assert all(torch.equal(p, q) for p, q in zip(before, theta.parameters, strict=True))
    a, b = (theta.grad(nll, DATA[role]) for role in ("harmful", "general"))
    assert theta.trace["cosine/harmful"] == pytest.approx(cosine(a, b))
    assert {"nll/alignment", "nll/harmful", "nll/general"} <= set(theta.trace)


def test_the_gradient_moves_exactly_eps_along_the_paper_s_directions(network, monkeypatch):
    moves, real = [], Theta.step
    monkeypatch.setattr(Theta, "step", lambda self, by: (moves.append(by), real(self, by))[1])
    theta = Theta(network)
    a, b = (theta.grad(nll, DATA[role]) for role in ("harmful", "general"))
    u, v, c = (1 / a.norm()) * a, (1 / b.norm()) * b, cosine(a, b)
    for radius, eps in (("absolute", 1e-3), ("relative", 1e-3 * Vector([p.detach() for p in theta.parameters]).norm())):
        moves.clear()
        SEAM(radius=radius).gradient(theta, DATA)
        assert len(moves) == 2
        for got, want in zip(moves, (v - c * u, u - c * v), strict=True):
            assert (got - eps * want).norm() < 1e-9 * eps


@pytest.mark.parametrize(
    ("method", "passes"),
    [(SEAM(), 5), (SEAM(difference="central"), 7), (SEAM.paper(), 6), (SEAM.released(), 6), (SEAM(beta=0.0), 2)],
    ids=repr,
)
def test_five_gradients_where_terms_can_be_merged(network, monkeypatch, method, passes):
    count, real = [], Theta.grad
    monkeypatch.setattr(Theta, "grad", lambda self, *given: (count.append(given), real(self, *given))[1])
    method.gradient(Theta(network), DATA)
    assert len(count) == passes


def test_merging_changes_nothing(network):
    theta = Theta(network)
    g = theta.grad(nll, DATA["harmful"])
    lost = theta.trace["nll/harmful"]
    want = theta.grad(nll, DATA["alignment"]) - (1 / (1 + lost)) * g
    got = SEAM(beta=0.0, ceiling="none").gradient(theta, DATA)
    assert (got - want).norm() < 1e-12 * want.norm()


def test_without_unlearning_and_coupling_it_is_sft_bit_for_bit(network):
    theta = Theta(network)
    bare = SEAM(unlearn="none", beta=0.0)
    assert bare.reads == {"alignment": 1}
    for mean in ("example", "token"):
        plain, silent = (m.gradient(theta, DATA).tensors() for m in (SFT(mean=mean), replace(bare, mean=mean)))
        assert all(torch.equal(a, b) for a, b in zip(plain, silent, strict=True))


def test_unlearning_raises_the_harmful_loss_ever_more_slowly_and_ends_at_ln_v(network):
    theta, method = Theta(network), SEAM(alpha=0.0, beta=0.0)
    for _ in range(5):  # one who knows something
        theta.step(-0.05 * theta.grad(nll, DATA["harmful"]))
    before = theta.value(nll, DATA["harmful"])
    assert before < math.log(tiny.SMALL_VOCAB)
    with theta.moved(-1e-3 * method.gradient(theta, DATA)):
        assert theta.value(nll, DATA["harmful"]) > before
    # A model that is far above ln V already: the paper's term goes on, by 1/(1 + CE), ours has ended.
    g = theta.grad(nll, DATA["harmful"])
    theta.step(1.0 * g)
    lost = theta.value(nll, DATA["harmful"])
    assert lost > math.log(tiny.SMALL_VOCAB)
    assert method.gradient(theta, DATA).norm() == 0
    on = replace(method, ceiling="none").gradient(theta, DATA)
    assert on.norm() == pytest.approx(theta.grad(nll, DATA["harmful"]).norm() / (1 + lost))


def test_twenty_steps_of_the_cosine_alone_lower_it(network):
    theta, method = Theta(network), SEAM(alpha=0.0, unlearn="none", beta=1.0)
    seen = []
    for _ in range(20):
        theta.step(-0.02 * method.gradient(theta, DATA).unit())
        seen.append(theta.trace["cosine/harmful"])
    assert seen[-1] < seen[0] - 0.2, seen


def test_after_training_a_harmful_step_raises_the_general_loss_and_a_benign_one_does_not():
    def hurts(method) -> tuple[float, float]:
        theta = Theta(tiny.gpt2())
        for _ in range(60):
            theta.step(-0.03 * method.gradient(theta, {**DATA, "alignment": DATA["general"]}).unit())
        here = theta.value(nll, DATA["general"])
        after = []
        for role in ("harmful", "general"):
            with theta.moved(-0.02 * theta.grad(nll, DATA[role]).unit()):
                after.append(theta.value(nll, DATA["general"]) - here)
        return after[0], after[1]

    harmful, benign = hurts(SEAM(beta=0.5, unlearn="none"))
    assert harmful > 0
    assert benign < harmful
    assert harmful > hurts(SFT())[0]


def test_the_loss_at_every_depth_is_that_of_transformers_hidden_states(network):
    theta, at = Theta(network), slow.weights(network)
    want = loss_at_depths(network, at, DATA["harmful"], "example")
    assert theta.value(every_depth, DATA["harmful"]) == pytest.approx(float(want.detach()), rel=1e-10)
    got = named(theta, theta.grad(every_depth, DATA["harmful"]))
    assert slow.relative_error(got, slow.gradient(want, at)) < 1e-9
    assert final_norm(network) is network.transformer.ln_f
    llama = tiny.llama()
    assert final_norm(llama) is llama.model.norm


def test_a_perturbation_that_does_not_survive_is_refused(network):
    theta = Theta(tiny.llama())
    with pytest.raises(PrecisionError, match=r"eps = 1e-09 does not survive.*float32"):
        SEAM(eps=1e-9).gradient(theta, DATA)
    with pytest.raises(PrecisionError, match="autocast"):
        SEAM().gradient(Theta(tiny.llama(), autocast=torch.bfloat16), DATA)


@pytest.mark.parametrize(
    ("dtype", "way", "survives"),
    [
        (torch.float32, 1e-3, True),
        (torch.float32, 1e-8, False),
        (torch.bfloat16, 1e-3, False),
        (torch.bfloat16, 10.0, True),
        (torch.float16, 1e-3, False),
    ],
)
def test_what_survives_is_measured_in_the_weights_own_dtype(dtype, way, survives):
    generator = torch.Generator().manual_seed(0)
    weights = [(0.02 * torch.randn(n, generator=generator)).to(dtype) for n in (300, 40_000)]
    by = Vector([torch.randn(len(p), generator=generator) for p in weights])
    by = (way / by.norm()) * by
    before = [p.clone() for p in weights]
    got = survival(weights, by)
    moved = [(p + d.to(dtype)).double() - p.double() for p, d in zip(weights, by.tensors(), strict=True)]
    one, two = torch.cat(moved), torch.cat(by.tensors()).double()
    want = float(one @ two / (one.norm() * two.norm())) if one.norm() else 0.0
    assert got == pytest.approx(want, abs=1e-3)
    assert (got > 0.99) is survives
    assert (expected_survival(weights, way) > 0.99) is survives
    assert all(torch.equal(p, q) for p, q in zip(before, weights, strict=True))


def test_problems_come_before_compute():
    model = tiny.language_model()
    assert not SEAM().problems(model)
    assert [p.where for p in SEAM(beta=0.0).problems(model)] == ["beta"]
    assert [p.where for p in SEAM(eps=1e-9).problems(model)] == ["eps"]
    low = tiny.language_model(tiny.llama(dtype=torch.bfloat16))
    (found,) = SEAM().problems(low)
    assert found.where == "eps"
    assert "float32" in found.what
    for settings in ({"beta": -1.0}, {"alpha": -1.0}, {"eps": 0.0}, {"labels": "released"}):
        with pytest.raises(SettingsError):
            SEAM(**settings)


def test_what_it_declares_and_reads():
    coupled = (GradientCoupling(), Collapse(word="", on="general"))
    assert SEAM().mechanisms == (*coupled, Unlearning())
    assert SEAM(unlearn="none").mechanisms == coupled
    assert SEAM(beta=0.0).mechanisms == (Unlearning(),)
    assert not SEAM(beta=0.0, unlearn="none").mechanisms
    assert SEAM().reads == {"alignment": 1, "harmful": 1, "general": 1}
    assert SEAM.released().reads == {"safe": 1, "harmful": 1, "general": 1}
    assert SEAM(beta=0.0).reads == {"alignment": 1, "harmful": 1}


def test_parallel_and_vanishing_gradients_turn_nothing(network):
    theta = Theta(network)
    g = theta.grad(nll, DATA["harmful"])
    rows = (DATA["harmful"], DATA["harmful"])
    assert cosine_gradient(theta, nll, rows, (g, g), eps=1e-3).norm() == 0
    assert cosine_gradient(theta, nll, rows, (g, 0.0 * g), eps=1e-3).norm() == 0
