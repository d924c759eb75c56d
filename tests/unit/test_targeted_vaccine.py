"""Targeted Vaccine: how blocks are drawn, when, and what a frozen one keeps."""

from __future__ import annotations

import itertools
import logging
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity.errors import MissingExtraError, SettingsError
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.methods import targeted_vaccine
from immunity.methods.targeted_vaccine import TargetedVaccine
from immunity.models import LoRA, all_weights, attach
from immunity.optimizers import OPTIMIZERS
from immunity.samplers import without_replacement
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same
from immunity.theta import Theta, Vector

STREAMS = {
    "alignment": lambda step: tiny.batch(2, seed=step, role="alignment"),
    "harmful": lambda step: tiny.batch(2, seed=1000 + step, role="harmful"),
}


def batch(step=0):
    return {role: stream(step) for role, stream in STREAMS.items()}


def inclusion(weights, k):
    """The chance of each index to be in a sample: a sum over all orders in which it can be drawn."""
    chances = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        for i in order:
            chances[i] += chance
    return chances


def test_inclusion_follows_draws_one_after_the_other_and_not_the_odds():
    weights, k, n = [8.0, 4.0, 2.0, 1.0, 1.0], 3, 4000
    counts = torch.zeros(5)
    torch.manual_seed(0)
    for _ in range(n):
        counts[list(without_replacement(weights, k))] += 1
    want = torch.tensor(inclusion(weights, k))
    spread = 4 * (want * (1 - want) / n).sqrt()
    assert ((counts / n - want).abs() < spread).all()
    naive = k * torch.tensor(weights) / sum(weights)
    assert ((naive - want).abs() > spread).any()


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-6, 1.0, 1e300]), min_size=1, max_size=9), st.integers(1, 9))
def test_a_sample_has_no_repeats_and_nothing_of_weight_0(weights, k):
    able = sum(weight > 0 for weight in weights)
    if k > able:
        with pytest.raises(SettingsError, match="above 0"):
            without_replacement(weights, k)
        return
    drawn = without_replacement(weights, k)
    assert list(drawn) == sorted(set(drawn))
    assert len(drawn) == k
    assert all(weights[i] > 0 for i in drawn)


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], []])
def test_weights_that_are_none_are_refused(bad):
    with pytest.raises(SettingsError, match="cannot draw"):
        without_replacement(bad, 1)


def test_blocks_are_scored_every_k_steps_and_drawn_every_j(monkeypatch):
    scored, drawn, now = [], [], []
    norms, draw = targeted_vaccine.site_norms, targeted_vaccine.without_replacement
    monkeypatch.setattr(targeted_vaccine, "site_norms", lambda *a: (scored.append(now[-1]), norms(*a))[1])
    monkeypatch.setattr(
        targeted_vaccine, "without_replacement", lambda odds, k: (drawn.append((now[-1], k)), draw(odds, k))[1]
    )
    network = tiny.llama(layers=3)
    along = TargetedVaccine(gamma=2, redraw=2, rescore=5).start(tiny.language_model(network))
    theta = Theta(network)
    for step in range(11):
        now.append(step)
        along(theta, batch(step))
    assert scored == [0, 5, 10]
    assert drawn == [(step, 2) for step in range(0, 11, 2)]


def lora(layers):
    return attach(tiny.language_model(tiny.llama(layers=layers)), LoRA(r=2)).network


def parts(names):
    return {(int(name.split("layers.")[1].split(".")[0]), name.split("layers.")[1].split(".")[1]) for name in names}


def moving(network, freezes, drawn):
    along = TargetedVaccine(freezes=freezes).start(tiny.language_model(network))
    along.load_state_dict({"done": 1, "odds": [], "drawn": drawn})
    theta, before = Theta(network), picture(network)
    found = along(theta, batch())
    require_same(before, network, "a direction")
    names = [name for i, name in enumerate(theta.names) if i not in found.still]
    idle = [t for i, t in enumerate(found.tensors()) if i in found.still]
    assert not any(t.any() for t in idle)
    return names


def test_strict_freezes_whole_blocks_mlps_included():
    assert parts(moving(lora(6), "strict", [2, 4])) == {(i, part) for i in (2, 4) for part in ("self_attn", "mlp")}


def test_strict_freezes_what_is_in_no_block():
    model = all_weights(tiny.language_model())
    assert all(".layers.1." in name for name in moving(model.network, "strict", [1]))
    assert all(".layers.1." in name for name in moving(model.network, "compat", [1]))
    assert parts(moving(model.network, "compat", [0])) >= {(0, "self_attn"), (0, "mlp"), (1, "mlp")}


def authors_set(network, drawn):
    """Which parts get a gradient as the released code sets it up: attention toggled, other blocks checkpointed
    reentrantly, input embeddings without a gradient."""
    base = network.get_base_model().train()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()
    for layer, block in enumerate(base.model.layers):
        block.gradient_checkpointing = layer not in drawn and not (len(base.model.layers) > 26 and layer + 1 in drawn)
        for name, p in block.self_attn.named_parameters():
            p.requires_grad_("lora" in name and layer in drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: a checkpointed block without a gradient to its input
        nll(network, batch()["alignment"]).mean().backward()
    return parts(name for name, p in network.named_parameters() if p.grad is not None)


@pytest.mark.parametrize(("layers", "drawn"), [(6, [2, 4]), (6, [0]), (6, [5]), (28, [3, 27]), (28, [0, 9])], ids=str)
def test_compat_moves_what_the_released_code_moves(layers, drawn):
    want = authors_set(lora(layers), drawn)
    assert parts(moving(lora(layers), "compat", drawn)) == want
    if (layers, drawn) == (6, [2, 4]):
        assert want == {(2, "self_attn"), (4, "self_attn"), *((i, "mlp") for i in (2, 3, 4, 5))}


def test_left_out_is_kept_by_the_algebra_and_lost_in_a_sum_with_what_is_not():
    network = tiny.llama()
    theta = Theta(network)
    names = theta.names[:3]
    with theta.resting(names):
        found = theta.grad(nll, batch()["alignment"])
    assert found.still == {0, 1, 2}
    assert (-2.0 * found.unit()).still == {0, 1, 2}
    assert (found + found).still == {0, 1, 2}
    assert (found + theta.grad(nll, batch()["alignment"])).still == frozenset()
    assert all(p.requires_grad for p in network.parameters())
    given = Theta(network, trainable=dict(network.named_parameters()))
    with given.resting(names):
        again = given.grad(nll, batch()["alignment"])
    assert again.still == {0, 1, 2}
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), found.tensors(), strict=True))


class Turns:
    """Takes a gradient of everything, then leaves the first weights out for two steps, then takes all again."""

    def __init__(self, network, *, rest=True):
        self.seen, self.network, self.rest = [], network, rest

    def __call__(self, theta, rows):
        self.seen.append([p.detach().clone() for p in theta.parameters])
        if not 2 <= len(self.seen) <= 3:
            return theta.grad(nll, rows["alignment"])
        with theta.resting(theta.names[:4]):
            found = theta.grad(nll, rows["alignment"])
        return found if self.rest else Vector(found.tensors())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frozen_weight_does_not_move_whatever_the_optimiser(optimizer):
    how = Fit(steps=4, lr=1e-2, optimizer=optimizer, momentum=0.9, weight_decay=0.1)

    def moved(*, rest):
        network = tiny.llama()
        turns = Turns(network, rest=rest)
        try:
            fit(network, turns, {"alignment": STREAMS["alignment"]}, how)
        except MissingExtraError:
            pytest.skip("schedulefree is not installed")
        steps = list(itertools.pairwise([*turns.seen, [p.detach().clone() for p in network.parameters()]]))
        return [[not torch.equal(a, b) for a, b in zip(old, new, strict=True)] for old, new in steps]

    frozen = moved(rest=True)
    assert all(all(step) for step in (frozen[0], frozen[3]))
    for step in frozen[1:3]:
        assert step == [False] * 4 + [True] * (len(step) - 4)
    assert any(moved(rest=False)[1][:4])  # a gradient of 0 is no rest: decay and momentum move on


def test_frozen_blocks_stay_bit_for_bit_through_a_run_and_thaw_when_drawn():
    model = attach(tiny.language_model(tiny.llama(layers=4)), LoRA(r=2))
    along = TargetedVaccine(gamma=1, redraw=3, rescore=6).start(model)
    seen, drawn = [], []

    def told(theta, rows):
        seen.append({n: p.detach().clone() for n, p in zip(theta.names, theta.parameters, strict=True)})
        found = along(theta, rows)
        drawn.append(list(along.drawn))
        return found

    fit(model.network, told, STREAMS, Fit(steps=13, lr=1e-2, weight_decay=0.1))
    for step, (old, new) in enumerate(itertools.pairwise(seen)):
        for name in old:
            inside = any(f".layers.{layer}." in name for layer in drawn[step])
            assert torch.equal(old[name], new[name]) != inside, (step, name)
    assert len({tuple(layers) for layers in drawn}) > 1
    assert all(drawn[step] == drawn[step - step % 3] for step in range(13))


def test_state_goes_through_a_checkpoint_bit_for_bit():
    network = tiny.llama(layers=3)
    model, theta = tiny.language_model(network), Theta(network)
    method = TargetedVaccine(gamma=1, redraw=2, rescore=3)
    whole, first = method.start(model), method.start(model)
    for step in range(3):
        for along in (whole, first):
            torch.manual_seed(step)
            along(theta, batch(step))
    rest = method.start(model)
    rest.load_state_dict(first.state_dict())
    for step in range(3, 8):
        found = []
        for along in (whole, rest):
            torch.manual_seed(step)
            found.append(along(theta, batch(step)).tensors())
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert whole.state_dict() == rest.state_dict()


def test_what_it_cannot_do_is_reported_before_compute(caplog):
    model = tiny.language_model()
    assert [problem.where for problem in TargetedVaccine(rho=0.0).problems(model)] == ["rho"]
    model.network.model.layers[1].requires_grad_(False)
    (found,) = TargetedVaccine().problems(model)
    assert "block 1" in found.what
    with caplog.at_level(logging.WARNING):
        TargetedVaccine().start(model)
    assert "all of them are drawn" in caplog.text
    for settings in ({"rho": -1.0}, {"gamma": 0}, {"redraw": 0}, {"rescore": 0}, {"rho": float("nan")}):
        with pytest.raises(SettingsError):
            TargetedVaccine(**settings)
