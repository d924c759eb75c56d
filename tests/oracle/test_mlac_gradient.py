"""MLAC's direction and its attacker's against autograd, first and second order, on float64 models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.mechanisms import Conditioning, LookAhead, Unlearning
from immunity.methods.mlac import CLIP, MLAC, _Paced, banded
from immunity.methods.sft import SFT
from immunity.models import LoRA, attach
from immunity.reference import Reference, kl
from immunity.testing import tiny
from immunity.testing.watch import equal, made
from immunity.theta import Theta, Vector

LAM = 0.7


def data(method: MLAC, **how: object) -> dict[str, Batch]:
    return {role: tiny.batch(3 * k, seed=i, role=role, **how) for i, (role, k) in enumerate(method.reads.items())}


def started(method: MLAC, network: nn.Module):
    return method.start(tiny.language_model(network))


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def restricted(network: nn.Module, at: slow.Weights, batch: Batch, ceiling: str) -> Tensor:
    """min(loss, ln V) by explicit loops, the cut where ``ceiling`` says."""
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        logits = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0]
        asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        terms = torch.stack([-torch.log_softmax(logits[t - 1], -1)[row.labels[t]] for t in asked])
        most = math.log(logits.shape[-1])
        terms = terms.clamp(max=most) if ceiling == "token" else terms
        total = total + (terms.mean().clamp(max=most) if ceiling == "example" else terms.mean())
    return total / len(batch)


def adam(gradients: list[slow.Weights], *, smooth: float = 0.0) -> slow.Weights:
    """Adam's direction after these gradients, as its paper writes it; ``smooth`` gives the root a slope at 0."""
    t, found = len(gradients), {}
    for name in gradients[0]:
        m = sum(0.1 * 0.9 ** (t - 1 - i) * g[name] for i, g in enumerate(gradients)) / (1 - 0.9**t)
        v = sum(0.001 * 0.999 ** (t - 1 - i) * g[name] ** 2 for i, g in enumerate(gradients)) / (1 - 0.999**t)
        found[name] = m / ((v + smooth).sqrt() + 1e-8)
    return found


def objective(network, at, batch, method: MLAC, rates: slow.Weights, *, exact: bool, smooth=0.0, plain=False) -> Tensor:
    """What the attacker descends: the mean over k = 0 … K, differentiable in ``at`` and in ``rates``.

    Not ``exact``: the directions that he takes are constants, so that theta_k = theta - sum of constants · rates.
    """
    k, point, gradients, total = method.lookahead, dict(at), [], torch.zeros((), dtype=torch.float64)
    rows = batch["heldout"] if k else batch["harmful"]
    for step in range(k + 1):
        total = total + restricted(network, point, rows, method.ceiling) / (k + 1)
        if step < k:
            here = point if exact else {n: p.detach().requires_grad_() for n, p in point.items()}
            loss = slow.mean_loss(network, here, batch["harmful"].parts(k)[step])
            g = slow.gradient(loss, here, graph=exact)
            gradients.append(g if exact else {n: t.detach() for n, t in g.items()})
            move = gradients[-1] if plain else adam(gradients, smooth=smooth)
            point = {n: point[n] - rates[n] * move[n] for n in point}
    return total


def fixed(network: nn.Module, rate: float) -> slow.Weights:
    return {n: torch.tensor(rate, dtype=torch.float64) for n in slow.weights(network)}


def slopes(state: dict) -> Tensor:
    """The first gradient that the rates' Adam has seen: what its first moment is made of."""
    return state["adam"]["state"][0]["exp_avg"] / 0.1


CASES = [
    MLAC(lam=LAM, lookahead=k, groups=g, ceiling=c, lr=1e-2)
    for k, g, c in [
        (0, 1, "token"),
        (1, 1, "none"),
        (2, 2, "token"),
        (4, 4, "token"),
        (3, 1, "example"),
        (16, 1, "token"),
    ]
]


@pytest.mark.parametrize("method", CASES, ids=lambda m: f"{m.lookahead}-{m.groups}-{m.ceiling}")
def test_the_gradient_is_the_first_order_one(method):
    network = tiny.gpt2()
    theta, batch = Theta(network), data(method)
    got = named(theta, started(method, network)(theta, batch))
    at = slow.weights(network)
    raised = objective(network, at, batch, method, fixed(network, method.lr), exact=False)
    want = slow.gradient(slow.mean_loss(network, at, batch["alignment"]) - LAM * raised, at)
    assert slow.relative_error(got, want) < 1e-9


@pytest.mark.parametrize("groups", [1, 4])
def test_the_rates_get_the_gradient_of_the_same_loss_with_directions_held_fixed(groups):
    network = tiny.gpt2()
    method = MLAC(lookahead=3, groups=groups, lr=1e-2)
    theta, batch = Theta(network), data(method)
    direction = started(method, network)
    direction(theta, batch)
    got = slopes(direction.state_dict())
    names = list(slow.weights(network))
    group = banded(names, network, groups)
    log = torch.full((max(group) + 1,), math.log(1e-2), dtype=torch.float64, requires_grad=True)
    rates = {n: log[i].exp() for n, i in zip(names, group, strict=True)}
    at = {n: p.detach() for n, p in slow.weights(network).items()}
    (want,) = torch.autograd.grad(objective(network, at, batch, method, rates, exact=False), log)
    assert len(got) == (3 if groups > 1 else 1)
    assert (got.abs() > 1e-4).all(), "every group's rate has something to learn"
    assert torch.allclose(got, want, rtol=1e-9, atol=0)


def test_and_by_finite_differences_along_the_same_directions():
    """The recorded directions, replayed at other rates: no autograd on either side."""
    network = tiny.gpt2()
    method = MLAC(lookahead=3, groups=4, lr=1e-2)
    theta, batch, moves = Theta(network), data(method), []
    direction, step = started(method, network), theta.step
    theta.step = lambda by: (moves.append([t / 1e-2 for t in by.tensors()]), step(by))[1]
    direction(theta, batch)
    group = banded(theta.names, network, 4)

    def value(log: Tensor) -> float:
        total, point = 0.0, [p.detach().clone() for p in theta.parameters]
        for k in range(4):
            at = dict(zip(theta.names, point, strict=True))
            with torch.no_grad():
                total += float(restricted(network, at, batch["heldout"], "token")) / 4
            if k < 3:
                point = [p + log[i].exp() * m for p, i, m in zip(point, group, moves[k], strict=True)]
        return total

    start, eps, found = torch.full((3,), math.log(1e-2), dtype=torch.float64), 1e-4, []
    for i in range(3):
        by = eps * torch.eye(3, dtype=torch.float64)[i]
        found.append((value(start + by) - value(start - by)) / (2 * eps))
    assert torch.allclose(slopes(direction.state_dict()), torch.tensor(found, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_second_order_oracle_is_the_finite_difference_on_a_few_hundred_weights():
    network = tiny.gpt2(vocab=12, width=4, positions=8)
    assert sum(p.numel() for p in network.parameters()) < 700
    method = MLAC(lookahead=2, lr=1e-2, ceiling="none")
    batch = data(method, vocab=12, lengths=(3, 7))
    at, rates = slow.weights(network), fixed(network, 1e-2)
    exact = slow.gradient(objective(network, at, batch, method, rates, exact=True, plain=True), at)
    first = slow.gradient(objective(network, at, batch, method, rates, exact=False, plain=True), at)
    generator, eps = torch.Generator().manual_seed(0), 1e-5
    wrong = []
    for _ in range(5):
        along = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in at.items()}
        ends = [
            {n: (p + sign * eps * along[n]).detach().requires_grad_() for n, p in at.items()} for sign in (1.0, -1.0)
        ]
        a, b = (float(objective(network, w, batch, method, rates, exact=True, plain=True).detach()) for w in ends)
        slope = (a - b) / (2 * eps)
        assert float(sum((exact[n] * along[n]).sum() for n in at)) == pytest.approx(slope, rel=1e-5)
        wrong.append(abs(float(sum((first[n] * along[n]).sum() for n in at)) - slope) / abs(slope))
    assert max(wrong) > 1e-4, "the first order is not the whole gradient"


@pytest.mark.parametrize(
    ("k", "plain", "lr", "least"),
    [(1, False, 3e-4, 0.999), (4, False, 3e-4, 0.999), (4, False, 1e-2, 0.85), (4, True, 0.01, 0.98)],
)
def test_the_first_order_points_where_the_second_does_while_steps_are_small(k, plain, lr, least, record_property):
    """At rates that are no longer small it does not: 0.42 for four steps of SGD at 0.5."""
    network = tiny.gpt2()
    method = MLAC(lookahead=k)
    at, batch, rates = slow.weights(network), data(method), fixed(network, lr)
    a, b = (
        slow.gradient(objective(network, at, batch, method, rates, exact=e, smooth=1e-24, plain=plain), at)
        for e in (True, False)
    )
    cosine = float(sum((a[n] * b[n]).sum() for n in a) / (slow.norm(a) * slow.norm(b)))
    record_property("cosine", cosine)
    assert least < cosine < 1 - 1e-9


def reached(network: nn.Module, direction, batch: dict[str, Batch]) -> float:
    """The mean restricted loss over the walk, as the direction logs it."""
    theta = Theta(network)
    direction(theta, batch)
    k = len(batch["harmful"]) // 3
    return -sum(theta.trace[f"clamped-nll/heldout{f'@{i}' if i else ''}"] for i in range(k + 1)) / (k + 1)


def test_the_attacker_goes_down_the_loss_that_the_defender_goes_up():
    network = tiny.gpt2()
    method = MLAC(lam=100.0, lookahead=3, lr=3e-3, learn=0.3)
    batch, theta = data(method), Theta(network)
    racing = started(method, network)
    before = reached(network, racing, batch)  # one step of the rates, none of the weights
    after_rates = reached(network, racing, batch)
    assert after_rates < before - 1e-4
    still = started(replace(method, learn=0.0), network)
    g = still(theta, batch)
    with torch.no_grad():
        for p, t in zip(theta.parameters, g.unit().tensors(), strict=True):
            p.sub_(0.05 * t)
    assert reached(network, still, batch) > before + 1e-4
    assert still.rates.each() == [pytest.approx(3e-3)] * len(theta.names)


def test_every_rate_moves_and_they_stay_in_bounds():
    network = tiny.gpt2()
    for lr in (1e-6, 3e-4, 1e-2):
        racing = started(MLAC(lr=lr, learn=2.0), network)
        theta, rates = Theta(network), []
        for seed in range(4):
            racing(theta, data(MLAC()) | {"heldout": tiny.batch(3, seed=seed, role="heldout")})
            rates += racing.rates.log.exp().tolist()
        assert all(1e-6 * (1 - 1e-12) <= rate <= 1e-2 * (1 + 1e-12) for rate in rates)
        assert lr not in rates[:3] or lr in {1e-6, 1e-2}
        assert sum(key.startswith("attacker_lr/") for key in theta.trace) == 3


def test_without_a_walk_it_is_plain_adversarial_censoring():
    network = tiny.gpt2()
    method = MLAC(lam=LAM, lookahead=0, ceiling="none")
    assert method.reads == {"alignment": 1, "harmful": 1}
    theta, batch = Theta(network), data(method)
    racing = started(method, network)
    got = racing(theta, batch)
    want = theta.grad(nll, batch["alignment"]) - LAM * theta.grad(nll, batch["harmful"])
    assert (got - want).norm() < 1e-12 * want.norm()
    assert racing.rates.log.exp().tolist() == [pytest.approx(3e-4)] * 3, "nobody walks, so no rate is learnt"
    assert method.mechanisms == (Conditioning(), Unlearning())


def least_likely(network: nn.Module, rows: Batch) -> Batch:
    """The same rows, asked for the tokens that the network thinks least likely: every loss is above ln V."""
    found = []
    for row in rows.rows:
        with torch.no_grad():
            worst = network(torch.tensor([row.ids])).logits[0].argmin(-1).tolist()
        labels = [IGNORE if old == IGNORE else worst[t - 1] for t, old in enumerate(row.labels)]
        found.append(Tokens(row.ids, tuple(labels)))
    return Batch(tuple(found), rows.role)


@pytest.mark.parametrize("ceiling", ["token", "example", "none"])
def test_nothing_is_raised_above_the_ceiling(ceiling):
    network = tiny.gpt2()
    method = MLAC(lookahead=2, lr=1e-6, ceiling=ceiling, learn=0.1)
    theta, batch = Theta(network), data(method)
    batch["heldout"] = least_likely(network, batch["heldout"])
    racing = started(method, network)
    got, plain = racing(theta, batch), SFT().gradient(theta, batch)
    assert equal(got, plain) == (ceiling != "none")
    assert bool(slopes(racing.state_dict()).any()) == (ceiling == "none")


def test_it_takes_2k_plus_2_gradients():
    network, k = tiny.gpt2(), 5
    method = MLAC(lookahead=k)
    theta, calls = Theta(network), []
    real = theta.grad
    theta.grad = lambda loss, batch: (calls.append(f"{loss.name}/{batch.role}"), real(loss, batch))[1]
    started(method, network)(theta, data(method))
    counts = {name: calls.count(name) for name in calls}
    assert counts == {"nll/alignment": 1, "nll/harmful": k, "clamped-nll/heldout": k + 1}


def test_the_divergence_from_before_is_added_with_its_weight():
    network = tiny.gpt2()
    method = MLAC(lookahead=1, kl=0.5)
    racing, before = started(method, network), Reference(network)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    theta, batch = Theta(network), data(method)
    got = racing(theta, batch) - started(replace(method, kl=0.0), network)(theta, batch)
    want = 0.5 * theta.grad(kl(before), batch["alignment"])
    assert (got - want).norm() < 1e-9 * want.norm()
    assert want.norm() > 1e-3


def test_the_attacker_is_torchs_adam_with_clipped_gradients_at_rates_of_his_own():
    network = tiny.gpt2()
    theta = Theta(network)
    rates = [1e-3 * (1 + i % 3) for i in range(len(theta.names))]
    twin = [p.detach().clone().requires_grad_() for p in theta.parameters]
    adam = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(twin, rates, strict=True)])
    attacker, generator = _Paced(theta, rates), torch.Generator().manual_seed(0)
    start = [p.detach().clone() for p in theta.parameters]
    for scale in (1.0, 50.0, 0.1):  # of a norm of about 60, 3000 and 6
        g = [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in twin]
        theta.step(attacker(Vector(g)))
        for p, t in zip(twin, g, strict=True):
            p.grad = t
        torch.nn.utils.clip_grad_norm_(twin, CLIP)
        adam.step()
    for p, other, gone, was in zip(theta.parameters, twin, attacker.gone, start, strict=True):
        assert torch.allclose(p, other, rtol=0, atol=1e-10)
        assert torch.allclose(p - was, gone, rtol=0, atol=1e-14)


def test_groups_are_bands_of_blocks_and_one_for_the_rest():
    network = tiny.llama(layers=5)
    names = [name for name, _ in network.named_parameters()]
    found = dict(zip(names, banded(names, network, 2), strict=True))
    blocks = [{found[n] for n in names if f".layers.{i}." in n} for i in range(5)]
    assert blocks == [{0}, {0}, {0}, {1}, {1}]
    assert {found[n] for n in names if ".layers." not in n} == {2}
    assert set(banded(names, network, 9)) == set(range(6)), "no more bands than blocks"
    assert set(banded(names, network, 1)) == {0}
    lora = attach(tiny.language_model(network), LoRA(r=2)).network
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert sorted(set(banded(trained, lora, 5))) == list(range(5)), "nothing outside of blocks trains"


def test_state_goes_through_a_checkpoint_bit_for_bit(tmp_path):
    network = tiny.gpt2()
    method, theta = MLAC(lookahead=2, learn=0.1), Theta(network)
    whole, first, rest = (started(method, network) for _ in range(3))
    for along in (whole, first):
        for seed in range(3):
            along(theta, data(method) | {"heldout": tiny.batch(3, seed=seed, role="heldout")})
    torch.save(first.state_dict(), tmp_path / "state.pt")
    rest.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 6):
        a, b = (
            along(theta, data(method) | {"heldout": tiny.batch(3, seed=seed, role="heldout")})
            for along in (whole, rest)
        )
        assert equal(a, b)
        assert torch.equal(whole.rates.log, rest.rates.log)
    assert len(set(whole.rates.log.tolist())) == 3


def attacked(network: nn.Module, rows: dict[str, Batch], lr: float) -> float:
    """The held-out loss after a fine-tune of 8 steps on rows that are not those of the simulated walks."""
    theta = Theta(network)
    with theta.excursion():
        fit(network, lambda t, b: t.grad(nll, b["harmful"]), {"harmful": lambda s: rows["harmful"].parts(4)[s % 4]},
            Fit(steps=8, lr=lr, seed=1))  # fmt: skip
        return theta.value(nll, rows["heldout"])


def test_after_it_a_fine_tune_ends_at_a_higher_loss_than_after_sft():
    """The rows are learnable: prompts and answers of one pattern, which the starting model has learnt."""

    def rows(n: int, seed: int, role: str, sign: int) -> Batch:
        starts = [5 + (7 * i + 13 * seed) % 40 for i in range(n)]
        ids = [tuple(5 + (s + sign * t) % 50 for t in range(8)) for s in starts]
        return Batch(tuple(Tokens(i, (IGNORE,) * 3 + i[3:]) for i in ids), role)

    streams = {
        "alignment": lambda s: rows(4, s, "alignment", 1),
        "harmful": lambda s: rows(16, 100 + s, "harmful", -1),
        "heldout": lambda s: rows(4, 500 + s, "heldout", -1),
    }
    end = {}
    for name, method in (("sft", SFT()), ("mlac", MLAC(lookahead=4, lr=3e-3))):
        network = tiny.gpt2(dtype=torch.float32)
        known = {"alignment": lambda s: streams["alignment"](s) + streams["harmful"](s)}
        fit(network, SFT().gradient, known, Fit(steps=40, lr=1e-2))
        direction = method.gradient if isinstance(method, SFT) else started(method, network)
        fit(network, direction, streams, Fit(steps=25, lr=3e-3))
        held = {"harmful": rows(16, 900, "harmful", -1), "heldout": rows(8, 950, "heldout", -1)}
        end[name] = (attacked(network, held, 3e-3), Theta(network).value(nll, rows(8, 990, "alignment", 1)))
    assert end["mlac"][0] > 2 * end["sft"][0], end
    assert end["mlac"][1] < 1.0, end


def test_what_it_declares_and_refuses():
    model = made()
    assert MLAC().mechanisms == (LookAhead(steps=4, radius=3e-4, rule="adamw"), Unlearning())
    assert [p.where for p in MLAC(lam=0.0).problems(model)] == ["lam"]
    assert not MLAC().problems(model)
    flat = replace(model, network=nn.Linear(2, 2))
    assert [p.where for p in MLAC().problems(flat)] == ["groups"]
    assert not MLAC(groups=1).problems(flat)
    assert (MLAC.paper().lookahead, MLAC.paper().groups) == (16, 1)
    for bad in (
        {"lam": -1.0},
        {"lookahead": -1},
        {"lr": 1e-7},
        {"lr": 0.1},
        {"learn": -1.0},
        {"groups": 0},
        {"kl": -1.0},
    ):
        with pytest.raises(SettingsError):
            MLAC(**bad)
