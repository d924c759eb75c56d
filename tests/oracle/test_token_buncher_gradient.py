"""Token Buncher's directions equal autograd of a transcription, one answer and one token at a time, in float64."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import replace
from statistics import stdev

import numpy as np
import pytest
import torch
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.methods import token_buncher
from immunity.methods.token_buncher import TokenBuncher
from immunity.testing import tiny
from immunity.theta import Theta

DATA = {
    "alignment": tiny.batch(3, seed=1, role="alignment"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
}
SHORT = {"max_new_tokens": 5}
PAD = 0


@pytest.fixture
def model():
    """It often ends its turn early, so that answers have different lengths."""
    made = tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB))
    (stop,) = {tiny.SPECIALS.index("<|im_end|>")} & set(made.template.stop_ids)
    says = made.network.get_output_embeddings().weight[stop]
    with torch.no_grad():
        made.network.transformer.ln_f.bias += 4.5 * says / says.norm() ** 2
    return made


def shifted(network) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.03 * torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))


def table(network, at, row: Tokens):
    """[n, V]: log-probabilities where something is learnt; and what is."""
    scores = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0].log_softmax(-1)
    asked = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    return scores[[t - 1 for t in asked]], [row.ids[t] for t in asked]


def mean_entropy(network, at, row):
    log_p, said = table(network, at, row)
    return sum(-(line.exp() * line).sum() for line in log_p) / len(said)


def mean_kl(network, at, before, row):
    """KL(now || before) a token, over the whole vocabulary."""
    now, said = table(network, at, row)
    with torch.no_grad():
        then, _ = table(before, slow.weights(before), row)
    return sum((a.exp() * (a - b)).sum() for a, b in zip(now, then, strict=True)) / len(said)


def log_ratio(network, before, row):
    with torch.no_grad():
        (now, said), (then, _) = table(network, slow.weights(network), row), table(before, slow.weights(before), row)
    return float(sum(now[i, token] - then[i, token] for i, token in enumerate(said)))


def averaged(values, rows, mean):
    """Over rows, or over all of their tokens."""
    weights = [sum(label != IGNORE for label in row.labels[1:]) if mean == "token" else 1 for row in rows]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def group_advantages(rewards):
    """GRPO's: what is above the mean of the group, in standard deviations of it (n − 1), plus 1e-6."""
    out = []
    for group in rewards:
        centre = sum(group) / len(group)
        out += [(value - centre) / (stdev(group) + 1e-6) for value in group]
    return out


def splitmix(key: int, n: int) -> list[float]:
    """SplitMix64 from a state, in Python's whole numbers."""
    out, state, word = [], key % 2**64, 2**64
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % word
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % word
        out.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return out


def noised(network, at, row, how: TokenBuncher, seed):
    """−(1 − λ) log p(y) − μ Σ z log p over the others, token by token."""
    log_p, said = table(network, at, row)
    mu = how.noise * how.noise if how.compat else how.noise
    places = [t for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]
    key = zlib.crc32(np.array([seed or 0, *row.ids], dtype=np.int64).tobytes()) << 30
    total = 0.0
    for line, token, place in zip(log_p, said, places, strict=True):
        u = splitmix(key + place, len(line)) if how.drawn else [1.0] * len(line)
        others = [v for v in range(len(line)) if v != token]
        rest = sum(u[v] for v in others)
        total = total - (1 - how.noise) * line[token] - mu * sum(u[v] / rest * line[v] for v in others)
    return total / len(said)


def policy(network, at, rows, worth, mean):
    values = []
    for row, a in zip(rows, worth, strict=True):
        log_p, said = table(network, at, row)
        values.append(-a * sum(log_p[i, token] for i, token in enumerate(said)) / len(said))
    return averaged(values, rows, mean)


def compatible(row: Tokens, a: float, most: int) -> Tokens:
    n = most - sum(label != IGNORE for label in row.labels)
    labels = row.labels if a >= 0 else (IGNORE,) * len(row.ids)
    return Tokens(row.ids + (PAD,) * n, labels + (PAD,) * n)


def oracle(model, before, how: TokenBuncher, said, seed, *, turn: bool):
    """The whole direction, given what was answered: [harmful groups], and with them alignment groups."""
    network, at = model.network, slow.weights(model.network)
    flat = [row for group in said[0] for row in group]
    with torch.no_grad():
        rewards = [[-float(mean_entropy(network, at, row)) for row in group] for group in said[0]]
    if how.near == "penalty":
        rewards = [
            [r - how.kl * log_ratio(network, before, row) for r, row in zip(values, group, strict=True)]
            for values, group in zip(rewards, said[0], strict=True)
        ]
    worth = group_advantages(rewards)
    if turn:
        rows = [row for row, a in zip(flat, worth, strict=True) if a >= 0]
        if how.compat:
            rows = [compatible(row, a, how.max_new_tokens) for row, a in zip(flat, worth, strict=True)]
            rows = [row for row in rows if any(label != IGNORE for label in row.labels)]
        value = averaged([noised(network, at, row, how, seed) for row in rows], rows, how.mean)
    elif how.entropy == "gradient":
        value = averaged([mean_entropy(network, at, row) for row in flat], flat, how.mean)
    else:
        value = policy(network, at, flat, worth, how.mean)
    if how.near == "loss":
        rows = DATA["alignment"].rows
        value = value + how.kl * averaged([mean_kl(network, at, before, row) for row in rows], rows, how.mean)
    if how.near == "reward" and not turn:
        kept = [row for group in said[1] for row in group]
        with torch.no_grad():
            found = [[-float(mean_kl(network, at, before, row)) for row in group] for group in said[1]]
        value = value + how.kl * policy(network, at, kept, group_advantages(found), how.mean)
    return slow.gradient(value, at)


CASES = [
    TokenBuncher(),
    TokenBuncher(near="none", entropy="reward", group=3),
    TokenBuncher(drawn=True, noise=0.3, kl=0.4, mean="token"),
    TokenBuncher(drawn=True, near="none", compat=True, noise=0.2),
    replace(TokenBuncher.paper(), kl=0.7),
    replace(TokenBuncher.released(), kl=0.2),
]


@pytest.mark.parametrize("turn", [False, True], ids=["sharpens", "noises"])
@pytest.mark.parametrize("how", CASES, ids=repr)
def test_the_direction_equals_autograd_away_from_the_start(model, monkeypatch, how, turn):
    how = replace(how, **SHORT)
    direction, before = how.start(model), copy.deepcopy(model.network)
    shifted(model.network)
    said, seeds = [], []

    def spy(*args, **settings):
        groups = sample(*args, **settings)
        said.append([[answer.tokens for answer in group] for group in groups])
        return groups

    def seeded(noise, *, mass=None, seed=None):
        seeds.append(seed)
        return made(noise, mass=mass, seed=seed)

    sample, made = token_buncher.sample, token_buncher.noiser
    monkeypatch.setattr(token_buncher, "sample", spy)
    monkeypatch.setattr(token_buncher, "noiser", seeded)
    theta = Theta(model.network)
    theta.progress = how.first if turn else 0.0
    torch.manual_seed(5)
    found = direction(theta, DATA)
    assert len(seeds) == turn
    assert len({row.n_response for groups in said for group in groups for row in group}) > 2
    wanted = oracle(model, before, how, said, seeds[0] if seeds else None, turn=turn)
    got = dict(zip(theta.names, found.tensors(), strict=True))
    assert slow.relative_error(got, wanted) < 1e-9
    prompts = [
        row.ids[: next(t for t, label in enumerate(row.labels) if label != IGNORE)] for row in DATA["harmful"].rows
    ]
    for prompt, group in zip(prompts, said[0], strict=True):
        assert len(group) == how.group
        assert all(row.ids[: len(prompt)] == prompt for row in group)
        assert all(row.labels == (*(IGNORE,) * len(prompt), *row.ids[len(prompt) :]) for row in group)


def test_the_reward_is_minus_the_mean_entropy_of_each_answer_by_brute_force(model, monkeypatch):
    how = TokenBuncher(entropy="reward", near="none", **SHORT)
    seen = []

    def spy(groups, estimator):
        seen.extend(groups)
        return worth(groups, estimator)

    worth = token_buncher.worth
    monkeypatch.setattr(token_buncher, "worth", spy)
    torch.manual_seed(1)
    how.start(model)(Theta(model.network), DATA)
    assert len({answer.tokens.n_response for group in seen for answer in group}) > 2
    for group in seen:
        for answer in group:
            probabilities, _ = table(model.network, slow.weights(model.network), answer.tokens)
            by_hand = [-sum(math.exp(v) * v for v in line.tolist()) for line in probabilities]
            assert answer.reward == pytest.approx(-sum(by_hand) / len(by_hand), rel=1e-10)


def test_both_settings_of_entropy_together_are_the_gradient_of_the_expected_entropy():
    """Everything that can be said in two tokens of a vocabulary of three, enumerated."""
    network = tiny.gpt2(vocab=3, seed=4)
    at, stop = slow.weights(network), 2
    answers = [(stop,), *((a, b) for a in range(2) for b in range(3))]
    rows = [Tokens((0, 1, 1, *a), (IGNORE,) * 3 + a) for a in answers]
    p = []
    for row in rows:
        log_p, said = table(network, at, row)
        p.append(sum(log_p[i, token] for i, token in enumerate(said)).exp())
    assert float(sum(p).detach()) == pytest.approx(1.0, abs=1e-12)
    h = [mean_entropy(network, at, row) for row in rows]

    def parts(expected):
        return {name: g.detach() for name, g in slow.gradient(expected, at, graph=True).items()}

    whole = parts(sum(a * b for a, b in zip(p, h, strict=True)))
    reward = parts(sum(a * b.detach() for a, b in zip(p, h, strict=True)))
    own = parts(sum(a.detach() * b for a, b in zip(p, h, strict=True)))
    assert slow.relative_error(slow.combine((1.0, reward), (1.0, own)), whole) < 1e-12
    theta = Theta(network)
    batch = Batch(tuple(rows), "harmful", tuple(float(a.detach()) for a in p))
    ours = dict(zip(theta.names, theta.grad(token_buncher.entropy, batch).tensors(), strict=True))
    assert slow.relative_error(ours, own) < 1e-12
    assert slow.relative_error(own, whole) > 0.05
