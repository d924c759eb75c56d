"""NTL's gradient against autograd through the objective written with loops, on a two-layer float64 model."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.losses import nll
from immunity.mechanisms import Conditioning, Representation, Unlearning
from immunity.methods import ntl
from immunity.methods.ntl import NTL
from immunity.methods.sft import SFT
from immunity.mmd import pooled
from immunity.testing import tiny
from immunity.theta import Theta, Vector


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def batches(kept: int = 4, restricted: int = 3) -> dict[str, Batch]:
    return {
        "alignment": tiny.batch(kept, seed=1, role="alignment"),
        "harmful": tiny.batch(restricted, seed=2, role="harmful"),
    }


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def features(network, at, batch, block, over):
    """Φ of each row, one unpadded row at a time."""
    found, seen = [], []
    hook = network.transformer.h[block].register_forward_hook(lambda _module, _args, out: seen.append(out))
    for row in batch.rows:
        functional_call(network, at, (torch.tensor([row.ids]),))
        states = (seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]).reshape(len(row.ids), -1)
        answer = [t for t in range(len(row.ids)) if row.labels[t] != IGNORE]
        found.append(states[answer].mean(0) if over == "response" else states[answer[0] - 1])
    hook.remove()
    return found


def slow_mmd(xs, ys, kernel):
    every = xs + ys
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(every) for j, b in enumerate(every) if i != j]
    sigma = (sum(pairs) / len(pairs)).detach()

    def k(a, b):
        d = ((a - b) ** 2).sum()
        return torch.exp(-d) if kernel == "one" else sum(torch.exp(-d / (sigma * 2.0**i)) for i in range(-2, 3))

    def mean(left, right):
        return sum(k(a, b) for a in left for b in right) / (len(left) * len(right))

    return mean(xs, xs) + mean(ys, ys) - 2 * mean(xs, ys)


def objective(network, at, data, method, blocks=(0,)):
    kept = slow.mean_loss(network, at, data["alignment"])
    restricted = slow.mean_loss(network, at, data["harmful"])
    apart = sum(
        slow_mmd(
            *(features(network, at, data[role], b, method.over) for role in ("alignment", "harmful")), method.kernel
        )
        for b in blocks
    ) / len(blocks)
    if method.cap == "factors":
        taken = min(method.alpha * restricted, torch.tensor(method.beta)) * min(
            method.alpha_mmd * apart, torch.tensor(method.beta_mmd)
        )
    else:
        distance = min(method.alpha_mmd * apart, torch.tensor(method.beta_mmd))
        taken = min(method.alpha * restricted * distance, torch.tensor(method.beta))
    return kept - taken


CASES = [
    (NTL(), (0,)),
    (NTL.paper(), (0,)),
    (NTL(alpha=0.15, alpha_mmd=0.6, beta=2.0, beta_mmd=9.0), (0,)),
    (NTL(alpha=2.0, beta=0.5, alpha_mmd=0.6), (0,)),  # α L_A is above its cap, α′ MMD is not
    (NTL(alpha_mmd=3.0, beta_mmd=0.5), (0,)),  # the other way round
    (NTL(cap="product", alpha=2.0, alpha_mmd=3.0, beta=0.01, beta_mmd=9.0), (0,)),
    (NTL(depth=1.0, alpha_mmd=2.0, beta_mmd=9.0), (1,)),
    (NTL(depth=None, alpha_mmd=2.0, beta_mmd=9.0), (0, 1)),
    (NTL(over="prompt", alpha_mmd=2.0, beta_mmd=9.0), (0,)),
    (NTL(kernel="one", alpha_mmd=2.0, beta_mmd=9.0), (0,)),
]


@pytest.mark.parametrize(("method", "blocks"), CASES, ids=repr)
def test_equals_autograd_through_the_objective(network, method, blocks):
    at = slow.weights(network)
    want = slow.gradient(objective(network, at, batches(), method, blocks), at)
    theta = Theta(network)
    got = named(theta, method.gradient(theta, batches()))
    assert slow.relative_error(got, want) < 1e-10


def terms(network):
    """∇L_S, ∇L_A and ∇MMD of block 0, and the values of L_A and MMD."""
    at, data = slow.weights(network), batches()
    kept, restricted = (slow.mean_loss(network, at, data[role]) for role in ("alignment", "harmful"))
    apart = slow_mmd(*(features(network, at, data[role], 0, "response") for role in ("alignment", "harmful")), "five")
    # Block 1 has no part in the distance of block 0: + 0 · L gives its weights a gradient of 0.
    grads = [slow.gradient(one + 0.0 * kept, at, graph=True) for one in (kept, restricted, apart)]
    detached = [{name: g.detach() for name, g in grad.items()} for grad in grads]
    return detached, float(restricted.detach()), float(apart.detach())


def test_above_the_cap_on_a_factor_mmd_still_trains_and_the_restricted_loss_does_not(network):
    (kept, _, apart), _, _ = terms(network)
    theta = Theta(network)
    got = named(theta, NTL(alpha=5.0, beta=1.0, alpha_mmd=0.1).gradient(theta, batches()))
    assert slow.relative_error(got, slow.combine((1.0, kept), (-1.0 * 0.1, apart))) < 1e-10


def test_above_the_cap_on_the_product_neither_trains(network):
    (kept, _, _), _, _ = terms(network)
    theta = Theta(network)
    got = named(theta, NTL(cap="product", alpha=5.0, alpha_mmd=1.0, beta=1e-3).gradient(theta, batches()))
    assert slow.relative_error(got, kept) < 1e-12


def test_below_both_caps_the_two_forms_are_one_and_both_terms_train(network):
    (kept, restricted, apart), loss, distance = terms(network)
    want = slow.combine((1.0, kept), (-0.01 * distance, restricted), (-0.01 * loss, apart))
    theta = Theta(network)
    for method in (NTL(), NTL.paper()):
        assert slow.relative_error(named(theta, method.gradient(theta, batches())), want) < 1e-10


def test_the_released_ceiling_is_ten_nats_and_the_paper_s_is_higher():
    apart = torch.tensor(7.71)
    for loss, released, paper in ((9.9, True, True), (10.1, False, True), (12.9, False, True), (13.1, False, False)):
        for method, trains in ((NTL(), released), (NTL.paper(), paper)):
            x = torch.tensor(loss, requires_grad=True)
            method._taken(x, apart).backward()
            assert (float(x.grad) > 0) == trains, (method.cap, loss)


def test_at_weight_0_it_is_sft_bit_for_bit_and_otherwise_not(network):
    theta = Theta(network)
    plain = SFT().gradient(theta, batches())
    for weak in (NTL(alpha=0.0), NTL(alpha_mmd=0.0)):
        got = weak.gradient(theta, batches())
        assert all(torch.equal(a, b) for a, b in zip(got.tensors(), plain.tensors(), strict=True))
        assert weak.mechanisms == ()
        assert len(weak.problems(tiny.language_model())) == 1
    assert (NTL().gradient(theta, batches()) - plain).norm() > 1e-3 * plain.norm()
    both = NTL(alpha=0.0, alpha_mmd=0.0).problems(tiny.language_model())
    assert [problem.where for problem in both] == ["alpha", "alpha_mmd"]


def test_padding_changes_nothing(network):
    """A long harmful row pads all others further; the others' features stay. Dropped rows show that it is looked at."""
    long = Tokens((3,) * 40, (IGNORE,) * 20 + (3,) * 20)
    data = batches()
    data["harmful"] = Batch((*data["harmful"].rows, long), "harmful")
    at = slow.weights(network)
    theta = Theta(network)
    want = slow.gradient(objective(network, at, data, NTL()), at)
    assert slow.relative_error(named(theta, NTL().gradient(theta, data)), want) < 1e-10


def test_gradient_checkpointing_changes_nothing(network):
    want = NTL(depth=None).gradient(Theta(network), batches())
    network.gradient_checkpointing_enable({"use_reentrant": False})
    got = NTL(depth=None).gradient(Theta(network.train()), batches())
    assert (got - want).norm() < 1e-12 * want.norm()


def test_it_is_coupled_so_it_refuses_to_be_split(network):
    with pytest.raises(SettingsError, match=r"'ntl' couples .* its 7 rows cannot be split"):
        NTL().gradient(Theta(network, micro_batch=6), batches())
    NTL().gradient(Theta(network, micro_batch=7), batches())


def test_the_log_has_both_losses_and_their_distance(network):
    theta, data = Theta(network), batches()
    NTL().gradient(theta, data)
    trace = theta.clear()
    for role in data:
        theta.value(nll, data[role])
    assert trace["nll/alignment"] == pytest.approx(theta.trace["nll/alignment"], abs=1e-12)
    assert trace["nll/harmful"] == pytest.approx(theta.trace["nll/harmful"], abs=1e-12)
    taken = 0.1 * trace["nll/harmful"] * 0.1 * trace["mmd/harmful"]
    assert trace["ntl/both"] == pytest.approx(trace["nll/alignment"] - taken, abs=1e-12)


def test_few_rows_are_warned_of_once_with_the_reason(network, caplog):
    ntl._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="immunity.methods.ntl"):
        for _ in range(2):
            NTL().gradient(Theta(network), batches(20, 3))
        NTL().gradient(Theta(network), batches(16, 16))
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "NTL sees 3 rows of a role in a step: below 16, "
    ]
    assert "floor (2.1 here, of at most 7.7)" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("depth", "near"), [(None, "all"), (0.0, "first-half"), (0.5, "middle"), (0.75, "middle"), (1.0, "last-half")]
)
def test_mechanisms_say_where_states_are_led_away(depth, near):
    assert NTL(depth=depth).mechanisms == (Representation(layers=near), Unlearning(), Conditioning())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -0.1}, {"alpha_mmd": -1.0}, {"beta": 0.0}, {"beta_mmd": -1.0}, {"depth": 1.1}, {"depth": -0.5}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        NTL(**settings)


def domains(n: int, seed: int) -> dict[str, Batch]:
    """Two domains with the same tokens in their answers; only one token of the prompt says which it is."""
    found = {}
    for role, mark in (("alignment", 5), ("harmful", 6)):
        rows = tiny.batch(n, seed=seed, lengths=(12, 12)).rows
        marked = [Tokens((mark, *row.ids[1:]), (IGNORE, *row.labels[1:])) for row in rows]
        found[role] = Batch(tuple(marked), role)
    return found


def probe(network, seen: dict[str, Batch], asked: dict[str, Batch]) -> float:
    """Accuracy on ``asked`` of a linear probe (ridge regression on ±1) of Φ, fitted on ``seen``."""

    def phi(batch):
        with torch.no_grad():
            padded = batch.padded()
            h = network(padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True)
            return pooled(h.hidden_states[1], padded.labels)

    def side(data):
        x = torch.cat([phi(data["alignment"]), phi(data["harmful"])])
        y = torch.tensor([1.0] * len(data["alignment"]) + [-1.0] * len(data["harmful"]), dtype=x.dtype)
        return torch.cat([x, torch.ones_like(x[:, :1])], 1), y

    x, y = side(seen)
    w = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    x, y = side(asked)
    return float(((x @ w).sign() == y).double().mean())


def test_after_training_the_domains_are_apart_and_one_of_them_is_unlearnt():
    trained = {}
    for name, method in (("ntl", NTL(alpha=0.5, alpha_mmd=0.5, beta=9.0, beta_mmd=9.0)), ("sft", SFT())):
        network = tiny.gpt2()
        theta = Theta(network)
        before = probe(network, domains(64, 100), domains(64, 200))
        for step in range(30):
            theta.step(-0.3 * method.gradient(theta, domains(16, step)).unit())
        losses = {role: theta.value(nll, batch) for role, batch in domains(64, 200).items()}
        trained[name] = (probe(network, domains(64, 100), domains(64, 200)), losses)
    (apart, ntl_losses), (mixed, sft_losses) = trained["ntl"], trained["sft"]
    assert apart > 0.95
    assert max(before, mixed) < 0.8
    assert ntl_losses["harmful"] > 3 * sft_losses["harmful"]
    assert ntl_losses["alignment"] < 1.3 * sft_losses["alignment"]
