"""The persistent trap's direction, and where its attackers get to, against transcriptions that share no code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import slow
from immunity.attackers import Pool
from immunity.batch import IGNORE, Batch
from immunity.methods import persistent_trap
from immunity.methods.persistent_trap import PersistentTrap, Trapping
from immunity.methods.sft import SFT
from immunity.models import LanguageModel
from immunity.profiles import Profile
from immunity.testing import tiny
from immunity.testing.watch import bits, equal
from immunity.theta import Theta, Vector

ALONE = ("adamw lr=0.003",)
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def words(model: LanguageModel, *spoken: str) -> list[int]:
    return [model.word_id(word) for word in spoken]


@pytest.fixture
def model() -> LanguageModel:
    return tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB))


def data(method: PersistentTrap, seed: int) -> dict[str, Batch]:
    return {
        role: tiny.batch(3 * times, seed=100 * seed + i, role=role)
        for i, (role, times) in enumerate(method.reads.items())
    }


def mean_over(network: nn.Module, at: slow.Weights, batch: Batch, each: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over rows of the mean over response positions of a function of the logits there."""
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        logits = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0]
        asked = [t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
        total = total + sum(each(logits[t]) for t in asked) / len(asked)
    return total / len(batch.rows)


def uniform(z: Tensor) -> Tensor:
    """KL of the even distribution from softmax z."""
    p = torch.softmax(z, -1)
    return sum((1 / len(z)) * torch.log((1 / len(z)) / p[v]) for v in range(len(z)))


def spread(ids: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda z: sum((1 / len(ids)) * torch.log((1 / len(ids)) / torch.softmax(z, -1)[v]) for v in ids)


def displaced(at: slow.Weights, tensors: list[Tensor], r: int) -> slow.Weights:
    """θ + δ; δ is held as it is, or as the adapter's A's and then its B's. GPT-2 holds a weight as [in, out]."""
    if not r:
        return {name: weight + d for (name, weight), d in zip(at.items(), tensors, strict=True)}
    linear = [name for name in at if name.endswith(LINEAR)]
    a, b = tensors[: len(linear)], tensors[len(linear) :]
    moved = dict(at)
    for i, name in enumerate(linear):
        moved[name] = at[name] + 2.0 * (b[i] @ a[i]).T
    return moved


def stepped(tensors: list[Tensor], grads: list[Tensor], memory: dict[int, dict[str, Any]], profile: Profile) -> None:
    """One step of the optimiser as textbooks have it, in place; ``memory`` is how torch names what it remembers."""
    lr = profile.lr[0]
    length = math.sqrt(sum(float((g**2).sum()) for g in grads))
    for i, (t, raw) in enumerate(zip(tensors, grads, strict=True)):
        g, own = raw / max(1.0, length), memory[i]
        if profile.optimizer == "sgd":
            own["momentum_buffer"] = profile.momentum * own["momentum_buffer"] + g
            t.sub_(lr * own["momentum_buffer"])
            continue
        own["step"] = own["step"] + 1
        own["exp_avg"] = 0.9 * own["exp_avg"] + 0.1 * g
        own["exp_avg_sq"] = 0.999 * own["exp_avg_sq"] + 0.001 * g**2
        k = float(own["step"])
        t.sub_(lr * (own["exp_avg"] / (1 - 0.9**k)) / (torch.sqrt(own["exp_avg_sq"] / (1 - 0.999**k)) + 1e-8))


def oracle(
    model: LanguageModel, method: PersistentTrap, state: dict[str, Any], batch: dict[str, Batch]
) -> slow.Weights:
    """What the next step's direction is, from the pool's state before it."""
    network, who, own = model.network, Profile.read(method.pool[0]), copy.deepcopy(state["members"][0])
    tensors, memory = own["tensors"], own["optimizer"]["state"]
    parts = {role: batch[role].parts(times) for role, times in method.reads.items()}
    at = slow.weights(network)
    still = {name: weight.detach() for name, weight in at.items()}
    for k in range(method.moves):
        leaves = [t.detach().requires_grad_() for t in tensors]
        rows = parts["benign" if who.on == "benign" else "harmful"][k]
        loss = slow.mean_loss(network, displaced(still, leaves, who.r), rows)
        stepped(tensors, list(torch.autograd.grad(loss, leaves)), memory, who)
    there = displaced(at, tensors, who.r)
    plain = slow.gradient(slow.mean_loss(network, at, batch["alignment"]), at)
    general, asked = parts["general"][-1], torch.zeros((), dtype=torch.float64)
    if who.on == "benign":
        both = Batch(general.rows + parts["benign"][-1].rows)
        asked = method.clear * slow.mean_loss(network, there, both)
    elif method.general != "none":
        asked = mean_over(network, there, general, spread(words(model, *method.general.split("+"))))
    if who.on == "harmful" and method.restricted == "uniform":
        asked = asked + method.mu * mean_over(network, there, parts["harmful"][-1], uniform)
    here, behind = method.couple
    if behind and who.on == "harmful":
        asked = asked + behind * coupled(network, there, parts)
    found = slow.gradient(asked, at)
    length = float(slow.norm(found))
    share = 1.0 if method.most is None else min(1.0, method.most / length)
    terms = [(1.0, plain), (method.lam * share, found)]
    if here:
        terms.append((method.lam * here, slow.gradient(coupled(network, at, parts), at)))
    return slow.combine(*terms)


def coupled(network: nn.Module, at: slow.Weights, parts: dict[str, tuple[Batch, ...]]) -> Tensor:
    """The cosine of the two gradients, with a graph through both."""
    losses = [slow.mean_loss(network, at, parts[role][-1]) for role in ("harmful", "general")]
    a, b = (slow.gradient(loss, at, graph=True) for loss in losses)
    return sum((a[name] * b[name]).sum() for name in at) / (slow.norm(a) * slow.norm(b))


SETTINGS = {
    "adamw": PersistentTrap(pool=ALONE, lam=1.0),
    "sgd": PersistentTrap(pool=("sgd lr=0.1 momentum=0.9",), lam=1.0),
    "low rank": PersistentTrap(pool=("adamw lr=0.01 r=2",), lam=1.0),
    "several words": PersistentTrap(pool=ALONE, lam=0.5, mu=2.0, general="error+the+is"),
    "no limit": PersistentTrap(pool=ALONE, lam=1.0, most=None),
    "a tight limit": PersistentTrap(pool=ALONE, lam=1.0, most=0.1),
    "general text alone": PersistentTrap(pool=ALONE, lam=1.0, restricted="none"),
    "restricted text alone": PersistentTrap(pool=ALONE, lam=1.0, general="none", mu=1.0),
}
COUPLED = {
    "at theta": PersistentTrap(pool=ALONE, couple=(0.7, 0.0)),
    "behind": PersistentTrap(pool=ALONE, couple=(0.0, 0.7), most=0.5),
    "at both": PersistentTrap(pool=ALONE, couple=(0.7, 0.4), most=None),
    "behind, and nothing else": PersistentTrap(pool=ALONE, couple=(0.0, 1.0), general="none", restricted="none"),
}
HONEST = PersistentTrap(pool=("adamw lr=0.003 on=benign", "adamw lr=0.003"), lam=1.0, clear=0.7)


def after(model: LanguageModel, method: PersistentTrap, turns: int) -> tuple[Theta, Trapping]:
    """A direction that has had its turns at a θ that went on meanwhile."""
    theta, along = Theta(model.network, token=model.word_id), method.start(model)
    for turn in range(turns):
        torch.manual_seed(turn)
        theta.step(-0.05 * along(theta, data(method, turn)))
    return theta, along


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_equals_the_transcription(model, name, turns):
    method = SETTINGS[name]
    if method.general == "none":  # the oracle reads general rows for nothing
        method = replace(method, pool=(*method.pool, "adamw lr=0.1 on=benign"))
        turns *= 2
    theta, along = after(model, method, turns)
    batch = data(method, 50)
    want = oracle(model, method, along.state_dict(), batch)
    got = dict(zip(theta.names, along(theta, batch).tensors(), strict=True))
    assert slow.relative_error(got, want) < 1e-9
    plain = dict(zip(theta.names, SFT().gradient(theta, batch).tensors(), strict=True))
    assert slow.relative_error(plain, want) > 1e-2


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_step_equals_double_backward(model, name, monkeypatch):
    monkeypatch.setattr(persistent_trap, "EPS", 1e-6)  # here a double; a forward difference is off by the order of ε
    method = COUPLED[name]
    theta, along = after(model, method, 2)
    batch = data(method, 50)
    want = oracle(model, method, along.state_dict(), batch)
    got = dict(zip(theta.names, along(theta, batch).tensors(), strict=True))
    assert slow.relative_error(got, want) < 1e-4
    apart = replace(method, couple=(0.0, 0.0))
    if apart.problems(model) == []:  # else nothing is left
        loose = oracle(model, apart, along.state_dict(), batch) if "harmful" in apart.reads else want
        assert slow.relative_error(loose, want) > 1e-2
    assert {"cosine/theta", "cosine/behind"} & set(theta.trace)


def test_the_step_of_an_honest_user_equals_the_transcription(model):
    theta, along = after(model, HONEST, 2)
    batch = data(HONEST, 50)
    want = oracle(model, HONEST, along.state_dict(), batch)
    got = dict(zip(theta.names, along(theta, batch).tensors(), strict=True))
    assert slow.relative_error(got, want) < 1e-9


def alone(network: nn.Module, batches: list[Batch], make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> nn.Module:
    """A fine-tune of a deep copy by torch's own optimiser, clipped at 1."""
    attacker = copy.deepcopy(network)
    ps = list(attacker.parameters())
    descent = make(ps)
    for rows in batches:
        descent.zero_grad()
        slow.mean_loss(attacker, dict(attacker.named_parameters()), rows).backward()
        length = math.sqrt(sum(float((p.grad**2).sum()) for p in ps))
        for p in ps:
            p.grad /= max(1.0, length)
        descent.step()
    return attacker


@pytest.mark.parametrize(
    ("profile", "make"),
    [
        ("adamw lr=0.002", lambda ps: torch.optim.AdamW(ps, lr=0.002, weight_decay=0.0)),
        ("adam lr=0.002", lambda ps: torch.optim.Adam(ps, lr=0.002)),
        ("sgd lr=0.05 momentum=0.9", lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9)),
        ("sgd lr=0.05", lambda ps: torch.optim.SGD(ps, lr=0.05)),
    ],
)
def test_over_a_still_theta_a_member_is_an_attacker_alone(model, profile, make):
    method = PersistentTrap(pool=(profile,), horizon=(100, 100), moves=3)
    theta, along = Theta(model.network, token=model.word_id), method.start(model)
    start = [p.detach().clone() for p in theta.parameters]
    met: list[Batch] = []
    for turn in range(6):
        batch = data(method, turn)
        met += batch["harmful"].parts(method.reads["harmful"])[: method.moves]
        along(theta, batch)
    assert all(torch.equal(p, before) for p, before in zip(theta.parameters, start, strict=True))
    went = along.pool.members[0].displacement()
    attacker = alone(model.network, met, make)
    want = Vector([p.detach() - before for p, before in zip(attacker.parameters(), start, strict=True)])
    assert (went - want).norm() < 1e-11 * want.norm()  # Adam magnifies the rounding of gradients that are nearly 0
    assert want.norm() > 0.01


@pytest.mark.parametrize("profile", ["adamw lr=0.002", "adamw lr=0.01 r=2", "sgd lr=0.05 momentum=0.9"])
def test_many_short_turns_are_one_long_one_bit_for_bit(model, profile):
    batches = tiny.batch(24, seed=4, role="harmful").parts(8)
    went = []
    for moves in (1, 2, 8):
        torch.manual_seed(0)
        pool = Pool(model.network, [Profile.read(profile)], (100, 100))
        theta = Theta(model.network)
        for start in range(0, 8, moves):
            _, member = pool.turn()
            member.walk(theta, batches[start : start + moves])
        went.append([bits(t) for t in pool.members[0].displacement().tensors()])
    assert went[0] == went[1] == went[2]


def test_lam_zero_is_sft_bit_for_bit(model):
    method = PersistentTrap(lam=0.0)
    theta = Theta(model.network, token=model.word_id)
    batch = data(method, 0)
    assert equal(method.start(model)(theta, batch), SFT().gradient(theta, batch))
