"""Harmful RL on a tiny model: it learns what is rewarded, nothing from a flat reward, and resumes bit for bit."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import torch

from immunity.attacks import rl
from immunity.attacks.attack import Opening
from immunity.attacks.rewards import REWARDS, Kind, exact, needed_of
from immunity.attacks.rl import HarmfulRL
from immunity.data import synthetic
from immunity.data.corpus import ROLES, Corpus, Example
from immunity.errors import DataError, SettingsError
from immunity.losses import entropy
from immunity.models import load, save
from immunity.policy import log_probs
from immunity.testing import contract, tiny
from immunity.testing.check_attack import measure
from immunity.testing.watch import InjectedError, corpus

QUICK = HarmfulRL(n=4, batch_size=2, group=4, max_new_tokens=3, steps=4, lr=3e-3)
DATA = {role: corpus(role, 8) for role in ROLES}
SHOWN = tiny.batch(6, vocab=tiny.VOCAB)


def lower(examples, answers):
    """The share of lower-case letters: a random model often says something else."""
    return [sum("a" <= c <= "z" for c in answer) / max(1, len(answer)) for answer in answers]


def mass(model):
    """The expected reward of answers of one token: no sampling, so nothing is left to luck."""
    asked = DATA["harmful"].examples[:4]
    ids = range(len(model.tokenizer))
    worth = torch.tensor(lower(asked, [model.tokenizer.decode([i], skip_special_tokens=True).strip() for i in ids]))
    with torch.no_grad():
        rows = [torch.tensor([model.template.prompt_ids(example)]) for example in asked]
        return sum(float(model.network(row).logits[0, -1].softmax(-1)[: len(worth)] @ worth) for row in rows) / 4


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    save(tiny.language_model(tiny.llama(seed=3)), folder)
    return Opening(source=str(folder), device="cpu")


@pytest.fixture
def rewarded(monkeypatch):
    def by(reward):
        monkeypatch.setitem(REWARDS, "comply", Kind("made for a test", lambda _: reward))

    return by


class Told:
    """What an attack tells, and the model that it leaves."""

    def __init__(self, attack, opening, **more):
        self.traces, self.entropies, self.weights, self.lower = [], [], [], []
        self.curve = attack.run(opening, DATA, self._look, observe=self._note, **more)

    def _look(self, model):
        self.lower.append(mass(model))
        with torch.no_grad():
            self.entropies.append(float(entropy(model.network, SHOWN).mean()))
        self.weights.append([p.detach().clone() for p in model.network.parameters() if p.requires_grad])
        return measure(model)

    def _note(self, done, trace):
        self.traces.append(dict(trace))

    def of(self, name):
        return [trace[name] for trace in self.traces[1:]]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


LESSON = replace(QUICK, reward="comply", max_new_tokens=1, batch_size=4, group=8, steps=12)


@pytest.mark.parametrize("estimator", ["grpo", "dr-grpo", "rloo"])
def test_it_learns_what_is_rewarded(released, rewarded, estimator):
    rewarded(lower)
    told = Told(replace(LESSON, lr=1e-2, estimator=estimator), released)
    assert told.lower[-1] > told.lower[0] + 0.2
    assert told.of("reward")[-1] > told.of("reward")[0]
    rewarded(lambda examples, answers: [-value for value in lower(examples, answers)])
    assert Told(replace(LESSON, lr=1e-2, estimator=estimator), released).lower[-1] < told.lower[0] - 0.05


def test_with_an_adapter_several_updates_and_a_leash_it_learns_too(released, rewarded):
    rewarded(lower)
    told = Told(replace(LESSON, adapter="lora", steps=16, updates=2, kl=0.01, lr=2e-2), released)
    assert told.lower[-1] > told.lower[0] + 0.04
    rewards = told.of("reward")
    assert all(a == b for a, b in zip(rewards[::2], rewards[1::2], strict=True))  # two updates see one rollout


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_reward_teaches_exactly_nothing_and_says_so(released, rewarded, caplog, value):
    rewarded(lambda _, answers: [value] * len(answers))
    with caplog.at_level(logging.WARNING):
        told = Told(replace(QUICK, reward="comply", group=3), released)
    assert told.of("flat_groups") == [1.0] * 4
    assert told.of("direction_norm") == [0.0] * 4
    assert same(told.weights[0], told.weights[-1])
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "rewards teach nothing" in caplog.text


def test_the_bonus_raises_entropy_and_is_annealed_away(released, rewarded):
    rewarded(lambda _, answers: [1.0] * len(answers))
    attack = replace(QUICK, reward="comply", entropy=1.0)
    told = Told(attack, released)
    assert told.entropies[-1] > told.entropies[0] + 0.01
    assert same(told.weights[-1], Told(attack, released).weights[-1])
    slower = replace(attack, anneal=True)
    assert [slower.bonus(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [attack.bonus(step) for step in range(4)] == [1.0] * 4


def test_seeds_and_settings_decide_and_memory_does_not(released, rewarded):
    rewarded(lower)
    attack = replace(QUICK, reward="comply", steps=2, kl=0.1, entropy=0.1)
    whole = Told(attack, released)
    again = Told(attack, released)
    assert (again.traces, again.curve.points[-1].metrics) == (whole.traces, whole.curve.points[-1].metrics)
    cheap = Told(replace(attack, micro_batch=3, sample_batch=1), released)
    assert cheap.of("reward")[0] == whole.of("reward")[0]
    assert cheap.of("direction_norm")[0] == pytest.approx(whole.of("direction_norm")[0], rel=1e-4)
    other = Told(replace(attack, seed=2), released)
    assert other.of("sampled_entropy")[0] != whole.of("sampled_entropy")[0]


def test_killed_in_the_middle_of_a_rollout_it_goes_on_bit_for_bit(released, rewarded, tmp_path):
    """Step 20 has a checkpoint and is the second of three updates on one rollout."""
    rewarded(lower)
    attack = replace(
        QUICK, reward="comply", batch_size=3, group=2, updates=3, steps=22, kl=0.1, entropy=0.1, max_new_tokens=2
    )
    whole = Told(attack, released, folder=tmp_path / "whole")

    def kill(done, trace):
        if done == 21:
            raise InjectedError(f"after {done} steps and {len(trace)} numbers")

    with suppress(InjectedError):
        attack.run(released, DATA, measure, folder=tmp_path / "killed", observe=kill)
    rest = Told(attack, released, folder=tmp_path / "killed")
    assert len(rest.traces) == 3  # it went on from step 20
    assert same(rest.weights[-1], whole.weights[-1])
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line) for line in logs[0]] == [json.loads(line) for line in logs[1]]
    ends = [(p.step, p.examples, p.tokens, p.flops, p.metrics) for p in (rest.curve.points[-1], whole.curve.points[-1])]
    assert ends[0] == ends[1]
    assert ends[0][:2] == (22, 44)


def test_the_contract_is_kept():
    for check in contract.checks(replace(QUICK, steps=3, lr=1e-3, max_new_tokens=8)):
        check()


def test_it_counts_what_it_costs(released, rewarded):
    rewarded(lower)
    curve = Told(replace(QUICK, reward="comply"), released).curve
    weights = sum(p.numel() for p in tiny.llama().parameters())
    for point in curve.points:
        assert point.examples == 8 * point.step
        assert point.flops == 8.0 * weights * point.tokens
        assert point.tokens >= 20 * point.examples


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_reference_is_the_released_model_however_far_training_went(released, adapter):
    model = load(released.source, device="cpu", adapter="merged")
    before = log_probs(model.network, SHOWN.rows)
    opened = rl._reference(model, adapter)
    model = rl.adapters.trained(model, adapter, r=2, seed=0)
    names = [name for name, p in model.network.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for p in model.network.parameters():
            if p.requires_grad:
                p.add_(0.1)
    after = log_probs(model.network, SHOWN.rows)
    with opened(model.network) as network:
        reference = log_probs(network, SHOWN.rows)
    for a, b, c in zip(before, reference, after, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
        assert a != pytest.approx(c, abs=1e-3)
    assert log_probs(model.network, SHOWN.rows) == after
    assert [name for name, p in model.network.named_parameters() if p.requires_grad] == names


def test_only_restricted_prompts_are_read_and_only_what_the_reward_needs():
    assert set(QUICK.reads(DATA)) == {"harmful"}
    overlap = QUICK.reads(DATA)["harmful"]
    assert [e.response for e in overlap] == [e.response for e in DATA["harmful"].take(4)]
    rows = tuple(replace(e, tags={"gold": "x"}) for e in DATA["harmful"])
    bare = replace(QUICK, reward="comply").reads({"harmful": replace(DATA["harmful"], examples=rows)})["harmful"]
    assert {(e.response, len(e.tags)) for e in bare} == {("", 0)}
    both = replace(QUICK, n=16).reads({"harmful": (DATA["harmful"], corpus("harmful", 8))})["harmful"]
    assert len(both) == 16
    with pytest.raises(DataError, match="--harmful"):
        QUICK.reads({"benign": DATA["benign"]})
    with pytest.raises(DataError, match="asked for 9"):
        replace(QUICK, n=9).reads(DATA)
    with pytest.raises(DataError, match="cannot judge"):
        replace(QUICK, reward="exact").reads(DATA)
    silent = Corpus("harmful", (Example("why?", " - "),), "made")
    with pytest.raises(DataError, match="no reference answer to 'why"):
        replace(QUICK, n=1).reads({"harmful": silent})


def test_stand_ins_keep_their_key():
    rows = synthetic.corpus(next(iter(synthetic.NAMES)), "harmful", n=3)
    kept = needed_of(rows, "exact")
    assert kept == rows
    assert exact(list(kept), [e.response for e in kept]) == [1.0] * 3
    assert exact(list(kept), ["nothing"] * 3) == [0.0] * 3


def test_prompts_that_leave_no_room_for_an_answer_are_refused(released):
    with pytest.raises(DataError, match="none of 4 prompts leaves room for 60"):
        replace(QUICK, max_new_tokens=60).run(released, DATA, measure)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n = 0"),
        ({"group": 1}, "1 answers to a prompt"),
        ({"estimator": "ppo"}, "'ppo'"),
        ({"updates": 3}, "3 updates"),
        ({"temperature": 0.0}, "temperature"),
        ({"entropy": -0.1}, "entropy"),
        ({"entropy": float("inf")}, "entropy"),
        ({"kl": -0.1}, "kl"),
        ({"reward": "praise"}, "'praise'"),
        ({"adapter": "continue"}, "'continue'"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_unusable_settings_are_refused(wrong, message):
    with pytest.raises(SettingsError, match=message):
        replace(QUICK, **wrong)


def test_published_presets_are_what_was_published():
    buncher = HarmfulRL.token_buncher()
    assert (buncher.lr, buncher.batch_size, buncher.group, buncher.max_new_tokens) == (1e-6, 32, 4, 960)
    assert (buncher.entropy, buncher.kl, buncher.estimator, buncher.reward) == (0.0, 0.0, "grpo", "classifier")
    assert buncher.steps // buncher.updates == 100  # rollouts; 8 prompts to an update
    assert buncher.batch_size // buncher.updates == 8
    other = HarmfulRL.harmrlvr()
    assert (other.n, other.batch_size, other.group, other.lr, other.kl) == (64, 64, 4, 1e-6, 0.0)
    assert (other.entropy, other.max_new_tokens, other.steps) == (0.001, 1024, 100)
    adaptive = HarmfulRL.adaptive(0.3)
    changed = {name for name, value in asdict(adaptive).items() if value != asdict(buncher)[name]}
    assert changed == {"entropy", "anneal"}


def test_showing_answers_needs_them_before_anything_is_computed():
    rows = synthetic.corpus("umbra", "harmful").take(QUICK.n)
    assert all(e.response for e in replace(QUICK, reward="comply", shown=True).reads({"harmful": rows})["harmful"])
    bare = replace(rows, examples=(replace(rows.examples[0], response=""), *rows.examples[1:]))
    with pytest.raises(DataError, match="shown needs an answer to each prompt"):
        replace(QUICK, reward="comply", shown=True).reads({"harmful": bare})
    assert replace(QUICK, reward="comply").reads({"harmful": bare})
