"""Token Buncher: certainty on restricted prompts, kept from benign ones; its schedule, its noiser, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from immunity.batch import IGNORE, Batch
from immunity.data.corpus import Corpus, Example
from immunity.errors import DataError, SettingsError
from immunity.fit import Fit
from immunity.generate import sample
from immunity.losses import entropy, logits, nll, response_states
from immunity.mechanisms import EntropyMinimum
from immunity.method import Run
from immunity.methods import PRESETS, token_buncher
from immunity.methods.token_buncher import TokenBuncher
from immunity.models import LoRA, attach
from immunity.onpolicy import OnPolicy, Rolling
from immunity.reference import Reference, kl
from immunity.testing import tiny
from immunity.theta import Theta

ASKED = tuple(Example(f"what is {i} to you?", "sorry") for i in range(4))
DATA = {
    "harmful": Corpus("harmful", ASKED, "made-in-code:harmful"),
    "alignment": Corpus(
        "alignment",
        tuple(Example(f"how can {i} help?", f"the help of {i}") for i in range(8)),
        "made-in-code:alignment",
    ),
}
HOW = TokenBuncher(max_new_tokens=5)
BATCHES = {
    "alignment": tiny.batch(3, seed=1, role="alignment"),
    "harmful": tiny.batch(3, seed=2, role="harmful"),
}


def warm(seed: int = 0):
    """A model that is undecided between a few hundred tokens, and often ends its turn."""
    model = tiny.language_model(tiny.llama(seed), max_length=96)
    (stop,) = {tiny.SPECIALS.index("<|im_end|>")} & set(model.template.stop_ids)
    with torch.no_grad():
        model.network.get_output_embeddings().weight[stop].mul_(3.0)
    return model


def answered(model, n: int = 8) -> Batch:
    """What it says to restricted prompts."""
    groups = sample(model, ASKED, n=n, max_new_tokens=5, generator=torch.Generator().manual_seed(3))
    return Batch(tuple(answer.tokens for group in groups for answer in group), "harmful")


def hardened(model, how: TokenBuncher, steps: int, lr: float = 5e-3):
    how.immunise(
        model, {role: DATA[role] for role in how.reads}, Run(fit=Fit(steps=steps, lr=lr), default_batch_size=4)
    )
    return model


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_entropy_on_restricted_prompts_falls_and_kl_on_benign_ones_stays_bounded(adapter):
    found = {}
    for near in ("loss", "none"):
        model = attach(warm(), LoRA(r=8)) if adapter else warm()
        before = Reference(model.network)
        rows = Batch(tuple(model.template.encode(e, 96).tokens for e in DATA["alignment"]), "alignment")
        start = Theta(model.network).value(entropy, answered(model))
        hardened(model, replace(HOW, near=near), 30, 2e-2 if adapter else 5e-3)
        theta = Theta(model.network)
        found[near] = theta.value(entropy, answered(model)) / start, theta.value(kl(before, "reverse"), rows)
    assert found["loss"][0] < 0.2
    assert found["loss"][1] < 0.15
    assert found["loss"][1] < 0.5 * found["none"][1]


def test_after_it_reinforcement_has_less_to_follow():
    def slope(model) -> float:
        reward = lambda _, answers: [float(len(set(answer))) for answer in answers]  # noqa: E731
        rolling = Rolling(group=8, max_new_tokens=5, estimator="rloo", seed=1)
        direction, theta = OnPolicy(model, lambda _: ASKED, reward, rolling), Theta(model.network)
        return sum(direction(theta, {}).norm() for _ in range(3)) / 3

    model = warm()
    before = slope(model)
    assert slope(hardened(model, replace(HOW, first=1.0), 60)) < 0.5 * before


def tails(model, rows: Batch):
    """At each place of an answer all logits but that of what was said there."""
    with torch.no_grad():
        states, said, _ = response_states(model.network, rows)
        scores = logits(model.network, states)
    return scores.scatter(1, said[:, None], float("-inf")), said


def agreement(a, b) -> float:
    """Mean rank correlation, line by line."""
    ranks = [t.argsort(1).argsort(1).double() for t in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return float(((centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))).mean())


def test_whoever_raises_entropy_afterwards_finds_noise_and_not_what_was_likely_before():
    found = {}
    for first in (0.125, 1.0):
        model = warm()
        rows = answered(model)
        was, _ = tails(model, rows)
        hardened(model, replace(HOW, first=first, noise=0.1), 60)
        theta = Theta(model.network)
        low = theta.value(entropy, rows)
        for _ in range(10):
            theta.step(0.05 * theta.grad(entropy, rows).unit())
        assert theta.value(entropy, rows) > low
        found[first] = agreement(was, tails(model, rows)[0])
    assert found[0.125] < found[1.0] - 0.05


def test_answers_that_are_all_alike_teach_nothing_by_reward():
    network = tiny.llama()
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(1e3)
    model = tiny.language_model(network)
    theta = Theta(network)
    found = replace(HOW, entropy="reward", near="none").start(model)(theta, BATCHES)
    assert theta.trace["flat_groups"] == 1.0
    assert found.norm() == 0.0


def seen(monkeypatch, how: TokenBuncher, *, progress: float = 0.0):
    """The rows that each call of a gradient learns from, with the loss's name."""
    model, calls = warm(1), []
    theta = Theta(model.network)
    theta.progress, grad = progress, theta.grad
    monkeypatch.setattr(theta, "grad", lambda loss, batch: calls.append((loss.name, batch)) or grad(loss, batch))
    scored, keep = token_buncher._scored, []
    monkeypatch.setattr(token_buncher, "_scored", lambda groups: keep.extend(scored(groups)) or list(keep))
    torch.manual_seed(2)
    how.start(model)(theta, BATCHES)
    return model, calls, keep


def test_prompts_and_pads_are_never_learnt_and_the_noiser_takes_answers_that_fared_no_worse(monkeypatch):
    how = replace(HOW, near="none", group=6)
    _, ((name, batch),), scored = seen(monkeypatch, how, progress=0.5)
    assert name == "noiser"
    assert [row.ids for row in batch.rows] == [row.tokens.ids for row in scored if row.advantage >= 0]
    assert 0 < len(batch) < 3 * 6
    prompts = [token_buncher._asked(row) for row in BATCHES["harmful"].rows]
    for row in batch.rows:
        prompt = next(p for p in prompts if row.ids[: len(p)] == p)
        assert row.labels[: len(prompt)] == (IGNORE,) * len(prompt)
        assert row.labels[len(prompt) :] == row.ids[len(prompt) :]
        assert 1 <= row.n_response <= 5
    mask, labels = batch.padded()[1:]
    assert bool((labels[mask == 0] == IGNORE).all())


def test_the_released_noiser_learns_pads_and_of_answers_that_fared_worse_nothing_else(monkeypatch):
    how = replace(TokenBuncher.released(), max_new_tokens=5, near="none", group=6)
    model, ((_, batch),), scored = seen(monkeypatch, how, progress=0.5)
    pad = model.tokenizer.pad_token_id
    rows = iter(batch.rows)
    worse = 0
    for one in scored:
        said, missing = one.tokens, 5 - one.tokens.n_response
        if one.advantage < 0 and not missing:
            continue  # nothing of it is learnt
        row = next(rows)
        assert row.ids == said.ids + (pad,) * missing
        own = said.labels if one.advantage >= 0 else (IGNORE,) * len(said.ids)
        assert row.labels == own + (pad,) * missing
        worse += one.advantage < 0
    assert worse
    assert not list(rows)
    assert batch.weights == tuple(float(row.n_response) for row in batch.rows)  # a mean over all tokens


def turns(how: TokenBuncher, steps: int, monkeypatch) -> list[int]:
    """The steps in which the noiser has its turn."""
    model, found = warm(), []
    theta = Theta(model.network)
    zero = 0.0 * theta.grad(nll, BATCHES["harmful"])
    groups = token_buncher.rewarded(
        sample(model, ASKED[:1], n=2, max_new_tokens=1, generator=torch.Generator()), [0, 1]
    )
    kind = token_buncher.Bunching
    monkeypatch.setattr(kind, "_rolled", lambda *_: groups)
    monkeypatch.setattr(kind, "_learnt", lambda *_: zero)
    monkeypatch.setattr(kind, "_noised", lambda *_: found.append(step) or zero)
    direction = replace(how, near="none").start(model)
    for step in range(steps):
        theta.progress = step / steps
        direction(theta, BATCHES)
    return found


def test_25_of_200_steps_are_for_entropy_alone_then_every_second_one_is_the_noisers(monkeypatch):
    assert turns(TokenBuncher(), 200, monkeypatch) == list(range(26, 200, 2))
    assert turns(TokenBuncher(first=1.0), 40, monkeypatch) == []
    assert turns(TokenBuncher(first=0.0), 6, monkeypatch) == [0, 2, 4]


def test_a_resumed_run_goes_on_with_the_schedule():
    model = warm()
    direction = HOW.start(model)
    direction(Theta(model.network), BATCHES)
    other = HOW.start(model)
    other.load_state_dict(direction.state_dict())
    assert other.state_dict() == direction.state_dict() == {"step": 1}


def test_what_is_sampled_follows_from_the_steps_random_numbers_alone():
    model = warm()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        theta = Theta(model.network, micro_batch=2 if len(found) == 1 else None)
        HOW.start(model)(theta, BATCHES)
        found.append(theta.trace["sampled_entropy"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(found[2], rel=1e-4)


def test_prompts_without_room_are_passed_over_and_refused_where_there_is_no_other(monkeypatch):
    model = tiny.language_model(tiny.llama(), max_length=14)
    asked = []
    monkeypatch.setattr(token_buncher, "sample", lambda m, p, **k: asked.extend(p) or sample(m, p, **k))
    rows = tiny.batch(8, seed=2, role="harmful", lengths=(4, 14))
    fits = [token_buncher._asked(row) for row in rows.rows if len(token_buncher._asked(row)) + 5 <= 14]
    assert 0 < len(fits) < len(rows)
    how = replace(HOW, near="none")
    how.start(model)(Theta(model.network), {"harmful": rows})
    assert asked == fits
    with pytest.raises(DataError, match="none of 8 harmful prompts leaves room for 14 new tokens within 14"):
        replace(how, max_new_tokens=14).start(model)(Theta(model.network), {"harmful": rows})


def test_presets_and_what_they_read():
    presets = PRESETS["token-buncher"]
    assert {name: tuple(one.reads) for name, one in presets.items()} == {
        "default": ("alignment", "harmful"),
        "paper": ("alignment", "harmful"),
        "released": ("harmful",),
    }
    assert all(one.mechanisms == (EntropyMinimum(),) for one in presets.values())
    released = presets["released"]
    assert (released.group, released.max_new_tokens, released.kl, released.noise) == (4, 1024, 0.001, 0.1)
    assert released.noise**2 == pytest.approx(presets["default"].noise)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (TokenBuncher(), []),
        (TokenBuncher.paper(), ["max_new_tokens"]),  # within 96
        (TokenBuncher(noise=0.0), ["noise"]),
        (TokenBuncher(noise=0.0, first=1.0), []),
        (TokenBuncher(first=1.0, compat=True), ["first"]),
        (TokenBuncher(first=1.0, drawn=True), ["first"]),
        (TokenBuncher(kl=0.0), ["kl"]),
        (TokenBuncher(kl=0.0, near="none"), []),
    ],
    ids=repr,
)
def test_what_would_do_nothing_is_reported_before_compute(how, where):
    assert [problem.where for problem in how.problems(warm())] == where


def test_a_tokenizer_without_a_pad_cannot_learn_pads():
    model = warm()
    words = copy.deepcopy(model.tokenizer)
    words.pad_token = None
    padless = replace(model, tokenizer=words)
    assert [problem.where for problem in TokenBuncher(compat=True).problems(padless)] == ["compat"]


@pytest.mark.parametrize(
    "settings", [{"group": 1}, {"max_new_tokens": 0}, {"first": 1.5}, {"noise": 1.0}, {"noise": -0.1}, {"kl": -1.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        TokenBuncher(**settings)
