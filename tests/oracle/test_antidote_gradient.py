"""AntiDote's gradients against autograd through weights that are really patched, one unpadded row at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.hypernetwork import Hypernetwork
from immunity.methods.antidote import AntiDote
from immunity.testing import tiny
from immunity.theta import Theta

METHOD = AntiDote(rank=2, width=6, rho=0.3)


def paired(role: str, seed: int, n: int = 6) -> Batch:
    """Rows whose prompts are the same for both roles, and whose answers are not."""
    rows = []
    for ask, said in zip(tiny.batch(n, seed=7).rows, tiny.batch(n, seed=seed).rows, strict=True):
        prompt = ask.ids[: 2 + len(ask.ids) // 2]
        answer = said.ids[: 1 + len(said.ids) // 2]
        rows.append(Tokens((*prompt, *answer), (IGNORE,) * len(prompt) + answer))
    return Batch(tuple(rows), role)


DATA = {
    "alignment": tiny.batch(3, seed=5, role="alignment"),
    "harmful": paired("harmful", 1),
    "safe": paired("safe", 2),
}
HARMFUL, SAFE = (DATA[role].parts(2) for role in ("harmful", "safe"))


def stirred(attacker: Hypernetwork) -> Hypernetwork:
    """As after some training: V is not 0, and some patches are at their cap."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for i, head in enumerate(attacker.v.values()):
            head.weight.normal_(std=0.2 if i % 2 else 2.0, generator=generator)
        for p in attacker.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return attacker


def duel(network: nn.Module, method: AntiDote = METHOD):
    """Started at the network, which is then moved away from its reference."""
    made = method.start(tiny.language_model(network))
    stirred(made.adversary)
    before = copy.deepcopy(network)
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.add_(0.02 * torch.cos(torch.arange(p.numel(), dtype=p.dtype) + i).view_as(p))
    return made, before


def normed(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def seen(network: nn.Module, at: slow.Weights, ids: tuple[int, ...], names: list[str]) -> dict[str, Tensor]:
    """What enters the layers: name -> [P, D_in]."""
    found: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0][0]})
        )
        for name in names
    ]
    functional_call(network, at, (torch.tensor([ids]),))
    for hook in hooks:
        hook.remove()
    return found


def pooled(h: Hypernetwork, place: int, n_in: int, x: Tensor) -> Tensor:
    """The mean over tokens after one layer of attention, [W]: one head at this width."""
    e = normed(affine(h.enter[str(n_in)], x)) + h.place.weight[place]
    q, k, v = affine(h.attend, normed(e)).chunk(3, -1)
    mixed = torch.stack([((q[i] @ k.T) / q.shape[-1] ** 0.5).softmax(-1) @ v for i in range(len(x))])
    return (e + affine(h.attended, mixed)).mean(0)


def written(h: Hypernetwork, size, mean: Tensor) -> Tensor:
    """The change of a weight, V U under its cap, [D_out, D_in]."""
    for norm, up, _, down in h.body:
        inner = affine(up, normed(mean) * norm.weight + norm.bias)
        mean = mean + affine(down, 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    cap, name = h.rho * size.norm, f"{size.n_in}-{size.n_out}"
    u = affine(h.u[name], normed(mean)).reshape(h.rank, size.n_in) / size.n_in**0.5
    v = affine(h.v[name], normed(mean)).reshape(size.n_out, h.rank) * cap / (size.n_out * h.rank) ** 0.5
    change = v @ u
    length = torch.linalg.matrix_norm(change)
    return change * (cap / length) if float(length.detach()) > cap else change


def changes(network, h: Hypernetwork, at: slow.Weights, rows: Batch, *, through: bool) -> list[dict[str, Tensor]]:
    """For each row: name of a layer -> the change of its weight."""
    means: list[dict[str, Tensor]] = []
    for row in rows.rows:
        prompt = row.ids[: row.labels.count(IGNORE)]
        found = seen(network, at if through else {n: t.detach() for n, t in at.items()}, prompt, list(h.layers))
        means.append({n: pooled(h, i, s.n_in, found[n]) for i, (n, s) in enumerate(h.layers.items())})
    if h.per == "batch":
        means = [{n: torch.stack([m[n] for m in means]).mean(0) for n in h.layers}] * len(means)
    return [{n: written(h, size, mean[n]) for n, size in h.layers.items()} for mean in means]


def said(network: nn.Module, at: slow.Weights, row: Tokens) -> Tensor:
    """Mean log-probability of the answer's tokens."""
    scores = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
    terms = [scores[t - 1, row.labels[t]] for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    return sum(terms) / len(terms)


def preference(network, h, at, chosen: Batch, rejected: Batch, *, through: bool = False) -> Tensor:
    terms = []
    every = changes(network, h, at, chosen, through=through)
    for change, better, worse in zip(every, chosen.rows, rejected.rows, strict=True):
        there = dict(at)
        for name, delta in change.items():  # GPT-2 holds [in, out]
            there[f"{name}.weight"] = at[f"{name}.weight"] + delta.T
        terms.append(-torch.log(torch.sigmoid(said(network, there, better) - said(network, there, worse))))
    return sum(terms) / len(terms)


def divergence(network, before, at: slow.Weights, batch: Batch) -> Tensor:
    """KL(p_theta || p_before) over response positions, by row."""
    base, rows = dict(before.named_parameters()), []
    for row in batch.rows:
        p = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
        q = functional_call(before, base, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        rows.append(sum((p[t].exp() * (p[t] - q[t])).sum() for t in asked) / len(asked))
    return sum(rows) / len(rows)


def objective(network, made, before, at, harmful: Batch, safe: Batch, method: AntiDote) -> Tensor:
    return (
        preference(network, made.adversary, at, safe, harmful, through=method.grad_through_activations)
        + method.lam * slow.mean_loss(network, at, DATA["alignment"])
        + method.beta * divergence(network, before, at, DATA["alignment"])
    )


def named(theta: Theta, vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


@pytest.mark.parametrize("per", ["example", "batch"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("through", [True, False])
def test_the_defenders_gradient_is_that_of_its_objective(through, targets, per):
    network = tiny.gpt2()
    method = replace(METHOD, grad_through_activations=through, targets=targets, per=per)
    made, before = duel(network, method)
    theta, at = Theta(network), slow.weights(network)
    got = made.defend(theta, DATA["alignment"], HARMFUL[1], SAFE[1])
    value = objective(network, made, before, at, HARMFUL[1], SAFE[1], method)
    assert slow.relative_error(named(theta, got), slow.gradient(value, at)) < 1e-9
    logged = theta.trace["attacked/safe"] + method.lam * theta.trace["nll/alignment"]
    logged += method.beta * theta.trace["reverse-kl/alignment"]
    assert logged == pytest.approx(float(value.detach()))


def test_what_gradients_through_activations_add_is_no_rounding():
    grads = []
    for through in (True, False):
        network = tiny.gpt2()
        made, _ = duel(network, replace(METHOD, grad_through_activations=through))
        grads.append(made.defend(Theta(network), DATA["alignment"], HARMFUL[1], SAFE[1]))
    assert (grads[0] - grads[1]).norm() > 1e-2 * grads[0].norm()


@pytest.mark.parametrize("rho", [0.05, 0.3, 3.0])
def test_caps_bind_for_some_patches_and_not_for_others(rho):
    network = tiny.gpt2()
    made, _ = duel(network, replace(METHOD, rho=rho))
    h = made.adversary
    for change in changes(network, h, slow.weights(network), SAFE[0], through=False):
        shares = [float(change[n].norm().detach()) / (rho * size.norm) for n, size in h.layers.items()]
        assert max(shares) == pytest.approx(1.0, abs=1e-9)
        assert min(shares) < 0.9


@pytest.mark.parametrize("per", ["example", "batch"])
def test_a_step_is_one_of_adamw_on_the_adversarys_gradient_and_then_the_defenders_direction(per):
    network, method = tiny.gpt2(), replace(METHOD, adversary_lr=0.01, per=per)
    made, before = duel(network, method)
    other = copy.deepcopy(made.adversary).requires_grad_(True)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    theta, at = Theta(network), slow.weights(network)
    got = made(theta, DATA)
    for p, g in zip(
        other.parameters(),
        torch.autograd.grad(preference(network, other, at, HARMFUL[0], SAFE[0]), [*other.parameters()]),
        strict=True,
    ):
        p.grad = g
    optimizer.step()
    for (name, a), b in zip(made.adversary.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-9, msg=name)
    want = slow.gradient(objective(network, made, before, at, HARMFUL[1], SAFE[1], method), at)
    assert slow.relative_error(named(theta, got), want) < 1e-9


def test_with_no_attacker_and_nothing_kept_it_is_a_preference_per_token():
    """rho = 0: -log sigma of the margin of the clean model, and nothing else with lam = beta = 0."""
    network, method = tiny.gpt2(), replace(METHOD, rho=0.0, lam=0.0, beta=0.0)
    made = method.start(tiny.language_model(network))
    stirred(made.adversary)
    theta, at = Theta(network), slow.weights(network)
    got = made(theta, DATA)
    pairs = zip(SAFE[1].rows, HARMFUL[1].rows, strict=True)
    terms = [-torch.log(torch.sigmoid(said(network, at, s) - said(network, at, h))) for s, h in pairs]
    assert slow.relative_error(named(theta, got), slow.gradient(sum(terms) / len(terms), at)) < 1e-9
