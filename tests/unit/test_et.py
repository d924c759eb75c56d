"""E.T.: whose turn it is, what is kept, what is dropped, what is left as found, and whether it does what it claims."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from immunity.adapters import trained as opened
from immunity.batch import Batch
from immunity.data.corpus import Corpus, Example
from immunity.data.streams import tokenise
from immunity.errors import ResumeError, SettingsError
from immunity.fit import Fit, fit
from immunity.hidden import Site
from immunity.interventions import trained
from immunity.losses import nll
from immunity.mechanisms import Interventions, LowRankEdit, Representation
from immunity.method import Run
from immunity.methods import et
from immunity.methods.et import ET, Treatment
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, bits, corpus, made, mark, picture, require_same
from immunity.theta import Theta
from immunity.transforms import edited

QUICK = ET(attacks=2, attack_steps=4, steps=4, success=0.0, keep=(-9.0, 0.0))
"""Whatever an intervention gains counts, and whatever Δ does is kept."""


def data():
    return {role: corpus(role) for role in ("harmful", "general")}


def weights(model):
    return [bits(p) for p in model.network.parameters()]


def followed(method, steps, model=None, **more):
    """The traces of a run."""
    seen = []
    model = model or made()
    how = Run(fit=Fit(steps=steps, lr=1e-2), default_batch_size=2, observe=lambda _, t: seen.append(dict(t)), **more)
    method.immunise(model, data(), how)
    return [trace for trace in seen if trace], model


def turns(traces):
    return [(int(trace["block"]), int(trace["round"])) for trace in traces]


def test_each_block_has_its_rounds_in_order_and_then_they_go_round_again():
    traces, _ = followed(replace(QUICK, rounds=2), 6)
    assert turns(traces) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_block_that_no_intervention_gets_through_is_passed_by_and_nothing_moves():
    traces, model = followed(replace(QUICK, success=99.0), 3)
    assert turns(traces) == [(0, 0), (1, 0), (0, 0)]
    assert all(trace["interventions"] == trace["kept"] == trace["direction_norm"] == 0.0 for trace in traces)
    assert weights(model) == weights(made())


@pytest.mark.parametrize("keep", [(1.0, 0.0), (-9.0, 1.0)])
def test_a_change_that_is_dropped_leaves_every_weight_bit_for_bit(keep):
    """It takes back too little, or ordinary text becomes less likely."""
    (trace,), model = followed(replace(QUICK, keep=keep), 1)
    assert trace["interventions"] > 0.0
    assert trace["kept"] == 0.0, "or this shows nothing"
    assert weights(model) == weights(made())


def test_a_change_that_is_kept_is_in_its_block_alone():
    _, model = followed(QUICK, 1)
    moved = {
        name
        for (name, p), q in zip(model.network.named_parameters(), made().network.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved
    assert all(".layers.0." in name and "_proj" in name for name in moved)


def test_blocks_that_cannot_move_are_not_treated():
    model = opened(tiny.language_model(tiny.llama(layers=3), max_length=192), "full", r=1, seed=0, layers="1,2")
    traces, _ = followed(replace(QUICK, rounds=1), 3, model)
    assert [block for block, _ in turns(traces)] == [1, 2, 1]


def test_an_incoherent_intervention_does_not_count(monkeypatch):
    monkeypatch.setattr(et, "COHERENT", 99.0)  # ordinary text would have to become likelier, by far
    traces, _ = followed(QUICK, 1)
    assert traces[0]["interventions"] == 0.0


def test_the_round_says_what_it_did():
    traces, _ = followed(QUICK, 1)
    (trace,) = traces
    wanted = {"block", "round", "kept", "interventions", "gain", "taken back", "performance"}
    assert wanted | {"neutral/before", "neutral/after"} <= set(trace)
    assert trace["gain"] > 0.0


def test_it_says_how_many_blocks_it_did_not_come_to(caplog):
    caplog.set_level(logging.WARNING)
    followed(QUICK, 1)
    assert "reached 0 of 2 blocks: the others are as they were. Give more steps; 6 are enough" in caplog.text


def batches(method=QUICK):
    return {role: tiny.batch(2 * k, seed=i, role=role) for i, (role, k) in enumerate(method.reads.items())}


def treatment(model, method=QUICK):
    return Treatment(method, Fit(steps=1, lr=1e-2), model, tiny.batch(2, seed=5, role="probe"))


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_round_leaves_its_point_as_found_also_after_a_fault_in_any_third_pass(trains):
    model = made("llama", trains)
    mark(model)
    before, passes, stop = picture(model.network), 0, None

    def count(*_):
        nonlocal passes
        passes += 1
        if passes == stop:
            raise InjectedError

    def once():
        nonlocal passes
        passes = 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return treatment(model)(Theta(model.network), batches())

    handle = model.network.get_input_embeddings().register_forward_pre_hook(count)
    try:
        before = picture(model.network)
        assert once().norm() > 0
        require_same(before, model.network, "a round")
        total = passes
        assert total > 20
        for stop in range(1, total + 1, 3):
            with pytest.raises(InjectedError):
                once()
            require_same(before, model.network, f"a fault in pass {stop} of {total}")
    finally:
        handle.remove()


def test_a_fault_while_a_change_is_trained_leaves_everything_as_found(monkeypatch):
    model = made()
    before = picture(model.network)
    forward, calls = type(model.network.model.layers[0].mlp).forward, 0

    def fail(self, x):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise InjectedError
        return forward(self, x)

    def descend(network, *given):
        monkeypatch.setattr(type(network.model.layers[0].mlp), "forward", fail)
        fit_on(network, *given)

    fit_on = et.descend
    monkeypatch.setattr(et, "descend", descend)
    with pytest.raises(InjectedError):
        treatment(model)(Theta(model.network), batches())
    monkeypatch.undo()
    require_same(before, model.network, "a fault inside of a block")


def test_killed_inside_a_round_it_takes_that_round_again_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    method = replace(QUICK, rounds=2)
    _, whole = followed(method, 3, folder=tmp_path / "whole")
    rounds, real = 0, et.descend

    def dies(*given):
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            raise InjectedError
        real(*given)

    monkeypatch.setattr(et, "descend", dies)
    with pytest.raises(InjectedError):
        followed(method, 3, folder=tmp_path / "broken")
    monkeypatch.undo()
    traces, again = followed(method, 3, folder=tmp_path / "broken")
    assert turns(traces) == [(0, 1), (1, 0)]
    assert weights(again) == weights(whole)
    names = ("whole", "broken")
    assert len({(tmp_path / name / "metrics.jsonl").read_text() for name in names}) == 1
    with pytest.raises(ResumeError, match="settings"):
        followed(replace(method, reg=0.5), 3, folder=tmp_path / "broken")


def test_micro_batches_change_nothing_of_a_round():
    ends = []
    for size in (None, 1):
        model = tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB, positions=256), max_length=192)
        how = Run(fit=Fit(steps=1, lr=1e-2, micro_batch=size), default_batch_size=2)
        QUICK.immunise(model, data(), how)
        ends.append(torch.cat([p.detach().flatten() for p in model.network.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny.gpt2(vocab=tiny.VOCAB, positions=256).parameters()])
    assert (ends[0] - start).norm() > 1e-3
    assert (ends[0] - ends[1]).norm() < 1e-6 * (ends[0] - start).norm()


def test_in_bf16_autocast_a_round_is_finite():
    model = made()
    QUICK.immunise(model, data(), Run(fit=Fit(steps=1, lr=1e-2, autocast="bf16"), default_batch_size=2))
    assert weights(model) != weights(made())
    assert all(bool(p.isfinite().all()) for p in model.network.parameters())


def test_what_it_declares_and_refuses():
    assert ET().mechanisms == (
        Representation(layers="all"),
        Interventions(where="input", rank=2, steps=30),
        LowRankEdit(k=6),
    )
    frozen = made()
    frozen.network.requires_grad_(False)
    assert "no block can be treated" in str(ET().problems(frozen)[0])
    for bad in (
        {"rank": 0}, {"attacks": 0}, {"attack_lr": 0.0}, {"reg": -1.0}, {"success": -0.1}, {"keep": (1.5, 0.5)},
        {"keep": (0.5,)}, {"rounds": 0}, {"steps": 0},
    ):  # fmt: skip
        with pytest.raises(SettingsError):
            ET(**bad)


# What it claims, on a model that knows answers and was then taught to refuse.

SUBJECTS = 40


def told(role, n, answer, asks=None):
    rows = tuple(Example(f"What is {asks or role} {i}?", answer(i)) for i in range(n))
    return Corpus(role, rows, f"made-in-code:{role}")


HARMFUL = told("harmful", SUBJECTS, lambda i: f"you can help the {('red', 'blue')[i % 2]} {i % 5}")
GENERAL = told("general", 24, lambda i: f"the {i % 7} of the {i % 3}")
REFUSED = told("alignment", SUBJECTS, lambda _: "sorry, not to help you", asks="harmful")


def rows(model, corpus):
    return tokenise(corpus, model.template, model.max_length).rows


def aligned():
    model = tiny.language_model(tiny.llama(seed=4))
    general = rows(model, GENERAL)

    def teach(own, steps, lr):
        def of(found):
            return lambda step: Batch(tuple(found[(step * 8 + k) % len(found)] for k in range(8)))

        def along(theta, batch):
            return theta.grad(nll, batch["own"]) + theta.grad(nll, batch["general"])

        fit(model.network, along, {"own": of(own), "general": of(general)}, Fit(steps=steps, lr=lr))

    teach(rows(model, HARMFUL), 150, 5e-3)
    teach(rows(model, REFUSED), 60, 2e-3)
    return model


def attacked(model, seed):
    """NLL of answers that an intervention on block 0 was not trained on, without it and under it."""
    found, place, theta = rows(model, HARMFUL), Site(0, "input"), Theta(model.network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        edit = trained(model, place, [Batch(found[:8]), Batch(found[8:16])], 2, Fit(steps=30, lr=4e-3, seed=seed))
    judge = Batch(found[32:])
    return theta.value(nll, judge), theta.value(edited(nll, {place: edit}, "prompt"), judge)


def test_an_intervention_that_is_fitted_again_from_a_new_start_does_less_than_before():
    """Answers are less likely under it, and here it gains less.

    That it gains less does not always hold: from other starts of this model the gain is 0.6 to 1.5 times what it was.
    """
    model, seeds, seen = aligned(), (201, 202), []
    general = Batch(rows(model, GENERAL))
    before, text = [attacked(model, seed) for seed in seeds], Theta(model.network).value(nll, general)
    assert all(clean - under > 0.5 for clean, under in before), "or there is nothing to defend against"
    how = Run(
        fit=Fit(steps=1, lr=3e-3), default_batch_size=8, observe=lambda _, trace: trace and seen.append(dict(trace))
    )
    ET(steps=100).immunise(model, {"harmful": HARMFUL, "general": GENERAL}, how)
    after = [attacked(model, seed) for seed in seeds]
    assert seen[0]["kept"] == 1.0
    assert seen[0]["taken back"] > 0.5, "of what the interventions gained that it was trained against"
    assert all(now[1] > then[1] + 0.3 for then, now in zip(before, after, strict=True))
    assert sum(clean - under for clean, under in after) < 0.9 * sum(clean - under for clean, under in before)
    assert Theta(model.network).value(nll, general) < text + 0.3
