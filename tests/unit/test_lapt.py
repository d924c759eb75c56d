"""LAPT: fresh noise in every step, drawn blocks, the way back to the start, and what it claims."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch

from immunity.data.corpus import Corpus
from immunity.errors import SettingsError
from immunity.fit import Fit, fit
from immunity.hidden import Site
from immunity.losses import nll
from immunity.mechanisms import Drift, Layers, Representation
from immunity.method import Run, StatefulMethod
from immunity.methods import lapt
from immunity.methods.lapt import LAPT, Patching, interpolate
from immunity.methods.sft import SFT
from immunity.models import LoRA, attach
from immunity.noise import noised
from immunity.testing import check_gradient, tiny
from immunity.testing.watch import InjectedError, bits, corpus, made, mark, picture, require_same
from immunity.theta import Theta

SAFE = tiny.batch(3, seed=1, role="safe")


def data(method):
    return {role: corpus(role) for role in method.reads}


def immunised(method, model=None, steps=3, **more):
    model = model or made()
    run = Run(fit=Fit(steps=steps, lr=1e-2, save_every=1), default_batch_size=3, **more)
    method.immunise(model, data(method), run)
    return model


def weights(model):
    return [bits(p) for p in model.network.parameters()]


def test_every_step_has_other_noise_and_a_resumed_one_the_same():
    theta = Theta(tiny.llama())

    def value(step, noise):
        torch.manual_seed(step)
        Patching(LAPT(layers="1", noise=noise), 2, None)(theta, {"safe": SAFE})
        return theta.clear()["noised-nll/safe"]

    assert value(0, "fresh") == value(0, "fresh") != value(1, "fresh")
    assert value(0, "fixed") == value(1, "fixed"), "the released code's"


def test_lambda_0_gives_the_start_bit_for_bit_and_1_the_end():
    model = made()
    start = weights(model)
    method = LAPT(layers="all", tolerance=None, lam=0.5)
    theta, how = Theta(model.network), Fit(steps=2, lr=1e-2)
    begin = [p.detach().clone() for p in theta.parameters]
    fit(model.network, Patching(method, 2, None), {"safe": lambda s: tiny.batch(3, seed=s, role="safe")}, how)
    end, ended = [p.detach().clone() for p in theta.parameters], weights(model)
    interpolate(theta, begin, end, 0.0)
    assert weights(model) == start != ended
    interpolate(theta, begin, end, 1.0)
    assert weights(model) == ended
    interpolate(theta, begin, end, 0.25)
    for p, a, b in zip(theta.parameters, begin, end, strict=True):
        torch.testing.assert_close(p.detach(), 0.75 * a + 0.25 * b)
    assert [problem.where for problem in LAPT(lam=0.0).problems(model)] == ["lam"]


def test_under_a_fresh_adapter_the_weights_are_interpolated_not_the_factors():
    model = attach(tiny.language_model(), LoRA(r=4))
    layer = model.network.base_model.model.model.layers[0].self_attn.q_proj
    theta = Theta(model.network)
    begin = [p.detach().clone() for p in theta.parameters]
    theta.step(0.1 * theta.grad(nll, SAFE))
    theta.step(0.1 * theta.grad(nll, SAFE))
    end, delta = [p.detach().clone() for p in theta.parameters], layer.get_delta_weight("default").detach()
    assert delta.any()
    interpolate(theta, begin, end, 0.3)
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), 0.3 * delta)


def test_half_of_what_was_trained_is_kept_and_less_where_ordinary_text_suffers(monkeypatch, caplog):
    whole = weights(immunised(LAPT(layers="all", tolerance=None, lam=1.0)))
    half = immunised(LAPT(layers="all", tolerance=None))
    start = made()
    for p, a, b in zip(half.network.parameters(), start.network.parameters(), whole, strict=True):
        end = torch.frombuffer(bytearray(b), dtype=torch.float32).view_as(p)
        torch.testing.assert_close(p.detach(), torch.lerp(a.detach(), end, 0.5))

    def shares(rise, tolerance):
        """λ that are tried when a whole λ raises ordinary text's NLL by ``rise``."""
        tried, real = [], lapt.interpolate
        monkeypatch.setattr(lapt, "interpolate", lambda *given: (tried.append(given[3]), real(*given)))
        value = Theta.value

        def pretended(self, loss, batch):
            honest = value(self, loss, batch)
            return (rise * tried[-1] if tried else 0.0) if batch.role == "general" and loss is nll else honest

        monkeypatch.setattr(Theta, "value", pretended)
        immunised(LAPT(layers="all", tolerance=tolerance))
        monkeypatch.undo()
        return tried

    assert shares(0.05, 0.05) == pytest.approx([0.5])
    assert shares(0.2, 0.07) == pytest.approx([0.5, 0.4, 0.3])
    with caplog.at_level(logging.WARNING):
        assert shares(9.0, 0.05) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert "kept all the same" in caplog.text


def test_blocks_are_drawn_by_their_fragility_and_one_that_is_not_named_never(monkeypatch):
    theta, drawn = Theta(tiny.llama(layers=4)), []
    monkeypatch.setattr(
        lapt, "noised", lambda loss, places, **how: (drawn.append(places[0].layer), noised(loss, places, **how))[1]
    )
    patching = Patching(LAPT(), 4, None, odds=[3.0, 0.0, 1.0, 0.0])
    torch.manual_seed(0)
    for _ in range(60):
        patching(theta, {"safe": tiny.batch(1, role="safe")})
    assert set(drawn) == {0, 2}
    assert 33 <= drawn.count(0) <= 55
    assert lapt._named("odd", 4) == [0.0, 1.0, 0.0, 1.0]


def test_where_no_block_is_fragile_all_are_drawn_alike_and_it_says_so(caplog):
    network = tiny.llama()
    patching = Patching(LAPT(), 2, (SAFE, SAFE))  # noise helps neither of two equal answers
    patching(Theta(network), {"safe": SAFE})
    assert patching.odds == [1.0, 1.0]
    assert "drawn alike" in caplog.text


def test_the_odds_are_saved_and_not_looked_for_again():
    first = Patching(LAPT(), 2, (SAFE, tiny.batch(3, seed=9, role="harmful")))
    first(Theta(tiny.llama()), {"safe": SAFE})
    again = Patching(LAPT(), 2, None)
    again.load_state_dict(first.state_dict())
    assert again.odds == first.odds


def test_what_it_reads_and_declares_follows_its_settings():
    assert LAPT().reads == {"safe": 1, "harmful": 1, "general": 1}
    assert LAPT(layers="0", tolerance=None).reads == {"safe": 1}
    assert LAPT().mechanisms == (Representation(layers="all"), Drift(radius=1.0, per="state", layers="all"))
    assert LAPT(layers="middle", alpha=0.5).mechanisms == (
        Representation(layers="middle"),
        Drift(radius=0.5, per="state", layers="middle"),
        Layers(protected="middle"),
    )
    assert LAPT(alpha=0.0).mechanisms == LAPT(lam=0.0).mechanisms == ()
    assert [problem.where for problem in LAPT(alpha=0.0, layers="9").problems(made())] == ["alpha", "layers"]
    for bad in ({"lam": 1.5}, {"alpha": -1.0}, {"tolerance": -0.1}, {"alpha": float("inf")}):
        with pytest.raises(SettingsError):
            LAPT(**bad)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_fault_in_any_pass_of_a_step_leaves_everything_as_found(call):
    model = made()
    mark(model)
    theta, before, passes = Theta(model.network), picture(model.network), 0
    patching = Patching(LAPT(), 2, (SAFE, tiny.batch(3, seed=9, role="harmful")))

    def fail(*_):
        nonlocal passes
        passes += 1
        if passes == call:
            raise InjectedError

    handle = model.network.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(InjectedError):
            patching(theta, {"safe": SAFE})
    finally:
        handle.remove()
    require_same(before, model.network, f"a fault in pass {call}")


def test_micro_batches_change_nothing_of_a_run():
    how = {"lr": 1e-3, "steps": 2}
    ends = []
    for size in (None, 1, 2):
        model = tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB, positions=256), max_length=192)
        LAPT().immunise(model, data(LAPT()), Run(fit=Fit(micro_batch=size, **how), default_batch_size=3))
        ends.append(torch.cat([p.detach().flatten() for p in model.network.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-8
    assert (ends[0] - ends[2]).norm() < 1e-8


def test_killed_anywhere_and_started_again_it_ends_with_the_same_bits(tmp_path):
    method = LAPT()
    whole = weights(immunised(method, steps=4, folder=tmp_path / "whole"))
    for cut in (1, 3, 4):  # 4: after the last checkpoint, before the way back

        def stop(done, trace, cut=cut):
            if done == cut and trace:
                raise InjectedError

        folder = tmp_path / str(cut)
        with pytest.raises(InjectedError):
            immunised(method, steps=4, folder=folder, observe=stop)
        assert weights(immunised(method, steps=4, folder=folder)) == whole


def test_after_training_safe_answers_suffer_less_from_noise_that_was_never_drawn():
    """Less than before. Not less than after as many steps of plain SFT, on a model as small as this one."""
    rows = [tiny.batch(6, seed=20 + i, role="safe", lengths=(8, 14)) for i in range(2)]
    network = tiny.llama(seed=2)

    def under():
        losses = [noised(nll, [Site(0, "output")], seed=9000 + k) for k in range(8)]
        return sum(Theta(network).value(loss, batch) for loss in losses for batch in rows) / 16

    learn = {"alignment": lambda step: rows[step % 2].as_role("alignment")}
    fit(network, SFT().gradient, learn, Fit(steps=100, lr=1e-2, seed=1))
    before = under()
    how = Fit(steps=100, lr=1e-3, seed=1, schedule="cosine")
    fit(network, Patching(LAPT(layers="0"), 2, None), {"safe": lambda step: rows[step % 2]}, how)
    assert under() < 0.8 * before
    assert sum(Theta(network).value(nll, batch) for batch in rows) / 2 < 0.01


@dataclass(frozen=True, kw_only=True)
class Steps(StatefulMethod):
    """LAPT's steps as a method of their own, for the checks of directions."""

    card = LAPT.card
    strength = ""
    layers: str = "all"

    @property
    def reads(self):
        return {"safe": 1}

    @property
    def mechanisms(self):
        return ()

    def problems(self, model):
        return []

    def start(self, model):
        pairs = (SAFE, tiny.batch(3, seed=9, role="harmful")) if self.layers == "fragile" else None
        return Patching(LAPT(layers=self.layers), 2, pairs)


@pytest.mark.parametrize("layers", ["all", "fragile"])
@pytest.mark.parametrize(
    "check",
    [
        check_gradient.leaves_everything_as_found,
        check_gradient.survives_a_fault_at_every_call,
        check_gradient.repeats_itself,
        check_gradient.micro_batches_change_nothing,
        check_gradient.is_finite_in_fp32_and_bf16,
        check_gradient.nan_is_refused,
    ],
)
def test_a_step_keeps_the_contract_of_directions(check, layers):
    check(Steps(layers=layers))


def test_safe_answers_walk_beside_their_prompts():
    safe = Corpus("safe", tuple(reversed(corpus("safe").examples)), "backwards")
    model = made()
    run = Run(fit=Fit(steps=1, lr=1e-2), default_batch_size=3)
    method = LAPT()
    method.immunise(model, {**data(method), "safe": safe}, run)
    assert weights(model) == weights(immunised(method, steps=1))
