"""OnPolicy outside of an attack: shares of fresh rollouts, and what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from immunity import onpolicy
from immunity.batch import Batch
from immunity.data.corpus import Example
from immunity.errors import DataError, SettingsError
from immunity.fit import Fit, fit
from immunity.generate import sample
from immunity.losses import nll
from immunity.models import LoRA, attach
from immunity.onpolicy import OnPolicy, Rolling
from immunity.policy import Scored, advantages, surrogate
from immunity.testing import tiny
from immunity.theta import Theta

ASKED = [Example("what is the error?", ""), Example("how can you help?", "")]


def odd(_, answers):
    """A reward that differs from answer to answer."""
    return [float(sum(map(ord, answer)) % 97) for answer in answers]


def test_a_direction_outside_of_an_attack_needs_a_reference_for_its_leash_and_prompts_that_divide():
    model = attach(tiny.language_model(), LoRA(r=2))
    rolling = Rolling(group=2, max_new_tokens=2, kl=0.1)
    with pytest.raises(SettingsError, match="needs a reference"):
        OnPolicy(model, lambda _: ASKED[:1], odd, rolling)
    uneven = OnPolicy(model, lambda _: ASKED[:1], odd, replace(rolling, kl=0.0, updates=2))
    with pytest.raises(SettingsError, match="1 prompts"):
        fit(model.network, uneven, {"harmful": lambda _: Batch(tiny.batch(2).rows)}, Fit(steps=1, lr=1e-3))


@pytest.mark.parametrize(("estimator", "divisor"), [("grpo", None), ("dr-grpo", 3), ("rloo", 3)])
def test_each_update_has_its_share_of_a_fresh_rollout_and_its_estimators_gradient(monkeypatch, estimator, divisor):
    def spy(rows, **settings):
        calls.append((tuple(rows), settings))
        return surrogate(rows, **settings)

    model, calls = tiny.language_model(tiny.llama(seed=3)), []
    rolling = Rolling(group=4, max_new_tokens=3, updates=2, seed=7, estimator=estimator)
    direction, theta = OnPolicy(model, lambda _: ASKED, odd, rolling), Theta(model.network)
    monkeypatch.setattr(onpolicy, "surrogate", spy)
    found = [direction(theta, {}) for _ in range(4)]
    assert {settings["divisor"] for _, settings in calls} == {divisor}
    prompts = [tuple(model.template.prompt_ids(example)) for example in ASKED]
    for part, ((share, _), vector) in enumerate(zip(calls, found, strict=True)):
        prompt, rows = prompts[part % 2], tuple(row.tokens for row in share)
        assert [row.ids[: len(prompt)] for row in rows] == [prompt] * 4
        said = [row.ids[len(prompt) :] for row in rows]
        answers = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        worth = advantages(odd(ASKED, answers), estimator)
        scored = [Scored(row, a) for row, a in zip(rows, worth, strict=True)]
        want = theta.grad(surrogate(scored, divisor=divisor), Batch(rows))
        assert want.norm() > 0
        assert (vector - want).norm() < 1e-4 * want.norm()
    assert calls[0][0][0].tokens != calls[2][0][0].tokens  # the same prompts are answered anew


@pytest.mark.parametrize("updates", [1, 2])
def test_an_answer_that_is_shown_is_learnt_from_where_all_sampled_ones_are_alike(monkeypatch, updates):
    """All sampled answers earn 0, so without the other one nothing would be learnt."""

    def spy(rows, **settings):
        calls.append(tuple(rows))
        return surrogate(rows, **settings)

    asked = [Example("what is the error?", "the answer is a"), Example("how can you help?", "help the error")]
    said = {example.response for example in asked}
    reward = lambda _, answers: [float(answer in said) for answer in answers]  # noqa: E731
    model, calls = tiny.language_model(tiny.llama(seed=3)), []
    rolling = Rolling(group=3, max_new_tokens=3, updates=updates, seed=7, shown=True)
    direction, theta = OnPolicy(model, lambda _: asked, reward, rolling), Theta(model.network)
    monkeypatch.setattr(onpolicy, "surrogate", spy)
    vector = direction(theta, {})
    rows = calls[0]
    assert len(rows) == 4 * len(asked) // updates
    assert theta.trace["reward"] == 0, "what is logged is the policy's own"
    assert theta.trace["flat_groups"] == 1
    worth = advantages([0.0, 0.0, 0.0, 1.0], "grpo")
    assert [row.advantage for row in rows[:4]] == worth
    prompt, answer = model.template.prompt_ids(asked[0]), model.template.answer_ids(asked[0])
    assert rows[3].tokens.ids == (*prompt, *answer[:3])
    assert all(label == -100 for label in rows[3].tokens.labels[: len(prompt)])
    plain = [Scored(row.tokens, row.advantage) for row in rows]
    want = theta.grad(surrogate(plain), Batch(tuple(row.tokens for row in rows)))
    assert (vector - want).norm() < 1e-4 * want.norm()  # before the first update a ratio is 1, whoever sampled
    pushed = theta.grad(nll, Batch((rows[3].tokens,)))
    assert vector @ pushed > 0, "its own loss falls"
    alone = OnPolicy(model, lambda _: asked, reward, replace(rolling, shown=False))(theta, {})
    assert alone.norm() == 0


def test_nothing_can_be_shown_where_there_is_no_answer():
    model = tiny.language_model()
    direction = OnPolicy(model, lambda _: ASKED, odd, Rolling(group=2, max_new_tokens=2, shown=True))
    with pytest.raises(DataError, match="no answer that could be shown"):
        direction(Theta(model.network), {})


def test_prompts_may_be_given_as_ids():
    model, found = tiny.language_model(), []
    for asked in (ASKED, [tuple(model.template.prompt_ids(example)) for example in ASKED]):
        drawn = torch.Generator().manual_seed(2)
        found.append(sample(model, asked, n=3, max_new_tokens=4, generator=drawn))
    assert found[0] == found[1]
