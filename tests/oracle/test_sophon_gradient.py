"""SOPHON's suppression against one backward pass over kept graphs, its loop against two optimisers by hand."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch
from immunity.errors import ResumeError, SettingsError
from immunity.fit import Fit, fit
from immunity.losses import nll
from immunity.mechanisms import Conditioning, LookAhead, Unlearning
from immunity.method import Run, streams
from immunity.methods import sophon
from immunity.methods.sft import SFT
from immunity.methods.sophon import OUTER, SOPHON, Loop, split
from immunity.models import LanguageModel, LoRA, attach
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, bits, corpus, made, picture, require_same, spied
from immunity.theta import Theta, Vector

FAR = SOPHON(lookahead=3, reinforce=2, attacker="sgd", lr=0.05, kl=0.0, rollback=None)
ROWS = 10


def harmful(k: int) -> list[Batch]:
    return list(tiny.batch(ROWS * k, seed=7, role="harmful").parts(k))


def outer(network: nn.Module, at: slow.Weights, batch: Batch, name: str) -> Tensor:
    """L_out by explicit loops over full logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        scores = functional_call(network, at, (torch.tensor([row.ids]),)).logits[0]
        terms = []
        for t in range(1, len(row.ids)):
            if row.labels[t] == IGNORE:
                continue
            z, y, v = scores[t - 1], row.labels[t], scores.shape[-1]
            p = z.softmax(-1)
            terms.append(
                {
                    "uniform": -(p.log() + torch.log(torch.tensor(float(v)))).mean(),
                    "ice": -torch.log(1 - p[y]),
                    "ice-released": -torch.log_softmax(1 - z, -1)[y],
                    "ce": -torch.minimum(-p[y].log(), torch.log(torch.tensor(float(v), dtype=p.dtype))),
                }[name]
            )
        total = total + torch.stack(terms).mean()
    return total / len(batch)


def graph(network: nn.Module, pairs, method: SOPHON) -> slow.Weights:
    """One backward pass over K kept graphs of a first-order walk: theta_k = theta + a constant, the attacker's way."""
    at, total = slow.weights(network), torch.zeros((), dtype=torch.float64)
    point, trained = dict(at), {n: p.detach().clone().requires_grad_() for n, p in at.items()}
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    attacker = kinds[method.attacker](trained.values(), lr=method.lr)
    for seen, unseen in pairs:
        g = slow.gradient(slow.mean_loss(network, trained, seen), trained)
        for n, p in trained.items():
            p.grad = g[n]
        attacker.step()
        point = {n: p + (trained[n] - p).detach() for n, p in at.items()}
        total = total + outer(network, point, unseen, method.outer) / len(pairs)
    return slow.gradient(total, at)


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def drawn(seed: int, k: int):
    torch.manual_seed(seed)
    return [split(rows) for rows in harmful(k)]


@pytest.mark.parametrize("attacker", ["sgd", "adamw"])
@pytest.mark.parametrize("name", OUTER)
def test_suppression_is_the_gradient_over_kept_graphs(name, attacker):
    network = tiny.gpt2()
    method = replace(FAR, outer=name, attacker=attacker, lr=0.05 if attacker == "sgd" else 3e-3, lookahead=4)
    theta, before = Theta(network), picture(network)
    pairs = drawn(3, 4)
    torch.manual_seed(3)
    got = method.suppression(theta, harmful(4))
    require_same(before, network, "suppression")
    want = graph(network, pairs, method)
    assert slow.relative_error(named(theta, got), want) < 1e-10
    home = theta.grad(OUTER[name], pairs[-1][1])
    assert (got - home).norm() > 0.01 * home.norm(), "not the gradient at home"


def test_the_attacker_does_not_see_what_is_held_out():
    theta, calls = Theta(tiny.gpt2()), []
    real = theta.grad
    theta.grad = lambda loss, rows: (calls.append((loss.name, rows)), real(loss, rows))[1]
    replace(FAR, lookahead=5).suppression(theta, harmful(5))
    assert [name for name, _ in calls] == ["nll", "kl-from-uniform"] * 5
    for i, whole in enumerate(harmful(5)):
        seen, unseen = calls[2 * i][1], calls[2 * i + 1][1]
        assert (len(seen), len(unseen)) == (9, 1)
        assert sorted(seen.rows + unseen.rows) == sorted(whole.rows)


@given(st.integers(2, 160), st.integers(0, 99))
def test_a_batch_is_split_nine_to_one_without_overlap(n, seed):
    rows = tiny.batch(n, seed=seed, lengths=(12, 20))
    torch.manual_seed(seed)
    seen, unseen = split(rows)
    assert len(unseen) == max(1, n // 10)
    assert sorted(seen.rows + unseen.rows) == sorted(rows.rows)


def test_the_held_out_rows_are_drawn_anew_each_time():
    rows = tiny.batch(50, lengths=(12, 20))
    torch.manual_seed(0)
    found = [set(split(rows)[1].rows) for _ in range(20)]
    assert len(set.union(*found)) > 35


def test_klu_is_0_without_a_gradient_where_every_token_is_equally_likely():
    network = tiny.gpt2()
    with torch.no_grad():
        network.get_output_embeddings().weight.zero_()
    theta, rows = Theta(network), tiny.batch(4)
    assert abs(theta.value(OUTER["uniform"], rows)) < 1e-14
    assert theta.grad(OUTER["uniform"], rows).norm() < 1e-14
    assert theta.grad(OUTER["ice"], rows).norm() > 1e-3


def small(seed: int = 0) -> LanguageModel:
    return tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB, positions=256, seed=seed), max_length=192)


def roles() -> dict:
    return {role: corpus(role, 24) for role in ("alignment", "harmful")}


def run(steps: int, **how) -> Run:
    given = {"lr": 1e-3, "schedule": "linear", "clip": 0.3, "weight_decay": 0.1, "save_every": 1} | how
    return Run(fit=Fit(steps=steps, **given), default_batch_size=3)


def by_hand(method: SOPHON, steps: int, pairs) -> list[Tensor]:
    """The paper's loop with torch's own AdamW, twice, each with its clipping and rate; the splits are given."""
    model, how = small(), run(steps)
    network, found = model.network, streams(method, model, roles(), how)
    weights = list(network.parameters())
    make = lambda: torch.optim.AdamW(weights, lr=1.0, weight_decay=0.1)  # noqa: E731
    fts, ntr = make(), make()

    def step(optimizer, gradient: slow.Weights, clip: float, rate: float) -> None:
        for p, g in zip(weights, gradient.values(), strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1e9)
        for p in weights:
            p.grad.mul_(min(1.0, clip / float(norm)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    for s in range(steps):
        rate = how.fit.rate(s)
        step(fts, graph(network, pairs[s], method), method.clip, method.alpha * rate)
        for rows in found["alignment"](s).parts(method.reinforce):
            at = slow.weights(network)
            step(ntr, slow.gradient(slow.mean_loss(network, at, rows), at), 0.3, method.beta * rate)
    return [p.detach() for p in weights]


@pytest.mark.parametrize(
    "method",
    [
        replace(FAR, alpha=2.0, beta=0.5, clip=0.01),
        replace(FAR, outer="ice", reinforce=1, alpha=3.0, beta=5.0),
        replace(FAR, attacker="adamw", lr=1e-3, rollback=10.0),
    ],
    ids=["klu", "ice", "adamw"],
)
def test_a_run_is_the_papers_loop_with_two_optimisers(method, monkeypatch):
    steps, told, model = 3, [], small()
    real = sophon.split
    monkeypatch.setattr(sophon, "split", lambda rows: (told.append(real(rows)), told[-1])[1])
    start = [p.detach().clone() for p in model.network.parameters()]
    method.immunise(model, roles(), run(steps))
    pairs = [told[s * method.lookahead : (s + 1) * method.lookahead] for s in range(steps)]
    want = by_hand(method, steps, pairs)
    for got, end, home in zip(model.network.parameters(), want, start, strict=True):
        assert torch.allclose(got, end, rtol=0, atol=1e-9)
        assert not home.abs().sum() or (got - home).norm() > 1e-3 * home.norm()


def looping(method: SOPHON, model: LanguageModel, **how) -> tuple[Loop, Theta, dict[str, Batch]]:
    batch = {role: tiny.batch(ROWS * k, seed=i, role=role) for i, (role, k) in enumerate(method.reads.items())}
    probe = batch["alignment"].as_role("probe")
    return Loop(method, Fit(steps=9, lr=1e-3, **how), model, probe), Theta(model.network), batch


def test_the_two_optimisers_keep_moments_of_their_own():
    network = tiny.gpt2()
    model = tiny.language_model(network)
    method = replace(FAR, reinforce=4)
    loop, theta, batch = looping(method, model, clip=None)
    torch.manual_seed(0)
    fts = method.suppression(theta, batch["harmful"].parts(3))
    fts = fts * min(1.0, 0.5 / fts.norm())
    torch.manual_seed(0)
    loop(theta, batch)
    state = loop.state_dict()
    taken = {
        kind: {float(s["step"]) for s in state[kind]["state"].values()} for kind in ("suppression", "reinforcement")
    }
    assert taken == {"suppression": {1.0}, "reinforcement": {4.0}}
    for i, g in enumerate(fts.tensors()):
        moment = state["suppression"]["state"][i]["exp_avg"]
        assert torch.allclose(moment, 0.1 * g, rtol=0, atol=1e-15)
        assert not torch.allclose(state["reinforcement"]["state"][i]["exp_avg"], moment, rtol=0, atol=1e-5)


def test_a_loop_leaves_the_point_as_found_whatever_fails():
    method = replace(FAR, lookahead=2, kl=0.5, rollback=0.1)
    model = tiny.language_model(tiny.gpt2())
    loop, theta, batch = looping(method, model)
    before = picture(model.network)
    with spied(theta) as calls:
        loop(theta, batch)
    require_same(before, model.network, "a loop")
    for i in range(1, len(calls) + 1, 3):
        again, theta, batch = looping(method, model)
        with suppress(InjectedError), spied(theta, fail_at=i):
            again(theta, batch)
        require_same(before, model.network, f"a loop, after a fault in call {i}")
    theta.clear()
    theta.value(nll, batch["harmful"])
    assert set(theta.trace) == {"nll/harmful"}


def test_micro_batches_change_nothing():
    found = []
    for size in (None, 2):
        model = tiny.language_model(tiny.gpt2())
        loop, _, batch = looping(replace(FAR, kl=0.3), model, optimizer="sgd")
        torch.manual_seed(0)
        found.append(loop(Theta(model.network, micro_batch=size), batch))
    assert (found[0] - found[1]).norm() < 1e-8 * found[0].norm()


def test_without_suppression_it_is_sft_n_steps_at_a_time(monkeypatch):
    monkeypatch.setattr(SOPHON, "problems", lambda *_: [])  # which refuses it
    method, plain = small(), small()
    SOPHON(alpha=0.0, kl=0.0, reinforce=3, lookahead=1).immunise(method, roles(), run(4, schedule="constant"))
    SFT().immunise(plain, roles(), run(12, schedule="constant"))
    pairs = zip(method.network.parameters(), plain.network.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in pairs), "but for rounding"
    assert any(
        not torch.equal(a, b) for a, b in zip(method.network.parameters(), small().network.parameters(), strict=True)
    )


def test_the_divergence_from_before_holds_the_model_back():
    far = {}
    for weight in (0.0, 30.0):
        model = tiny.language_model(tiny.gpt2())
        loop, theta, batch = looping(replace(FAR, kl=weight, alpha=5.0, reinforce=6), model, clip=None)
        for step in range(3):
            torch.manual_seed(step)
            theta.step(-loop(theta, batch))
        far[weight] = theta.value(sophon.kl(sophon.Reference(tiny.gpt2())), batch["alignment"])
    assert far[30.0] < 0.5 * far[0.0], far


def learnt(method: SOPHON) -> LanguageModel:
    """A model that knows the alignment rows of :func:`looping`: whatever suppresses them raises their loss."""
    model = tiny.language_model(tiny.gpt2())
    _, _, batch = looping(method, model)
    fit(model.network, SFT().gradient, {"alignment": lambda _: batch["alignment"]}, Fit(steps=30, lr=1e-2))
    return model


def test_a_loop_that_spoils_the_model_is_undone_bit_for_bit_and_the_run_goes_on():
    wild = replace(FAR, alpha=300.0, rollback=0.2)
    model = learnt(wild)
    loop, theta, batch = looping(wild, model)
    before = picture(model.network)
    fresh = loop.state_dict()["suppression"]["state"]
    by = loop(theta, batch)
    assert by.norm() == 0.0
    assert theta.trace["rollbacks"] == 1.0
    assert theta.trace["nll/probe"] > 0
    assert loop.state_dict()["suppression"]["state"] == fresh == {}, "both optimisers start anew"
    theta.step(-by)
    require_same(before, model.network, "a loop that is undone")
    loop(theta, batch)
    assert theta.trace["rollbacks"] == 2.0
    for harmless in (replace(wild, rollback=None), replace(wild, alpha=1e-3)):
        model = learnt(harmless)
        loop, theta, batch = looping(harmless, model)
        assert loop(theta, batch).norm() > 0
        assert theta.trace["rollbacks"] == 0.0


def test_rollbacks_compare_with_the_loss_before_the_run_not_with_the_last_loop():
    """Each loop raises the loss by less than the limit; together they pass it."""
    model = tiny.language_model(tiny.gpt2())
    method = replace(FAR, outer="ce", alpha=4.0, beta=1e-9, rollback=0.02)
    loop, theta, batch = looping(method, model)
    loop_rows = batch | {"harmful": (batch["alignment"] + batch["alignment"]).as_role("harmful")}
    loop_rows["harmful"] = Batch(loop_rows["harmful"].rows[: 3 * ROWS], "harmful")
    losses = [theta.value(nll, batch["alignment"])]
    while not theta.trace.get("rollbacks") and len(losses) < 40:
        theta.step(-loop(theta, loop_rows))
        losses.append(theta.value(nll, batch["alignment"]))
    assert 3 < len(losses) < 40
    rises = [b / a - 1 for a, b in pairwise(losses)]
    assert max(rises) < 0.02
    assert losses[-1] == losses[-2] > losses[0]


class Cut:
    def __init__(self, after: int | None) -> None:
        self.after, self.rows = after, {}

    def __call__(self, done: int, trace) -> None:
        self.rows[done] = dict(trace)
        if done == self.after:
            raise InjectedError(str(done))


def test_cut_off_and_resumed_it_ends_bit_for_bit_as_a_whole_run_rollbacks_included(tmp_path):
    method = SOPHON(lookahead=2, reinforce=2, alpha=30.0, rollback=0.01, lr=1e-2)
    ends, logs = [], []
    for name, cuts in (("whole", [None]), ("broken", [1, 3, 4, None])):
        for cut in cuts:
            model, seen = made(), Cut(cut)
            how = replace(run(6, lr=1e-2, clip=1.0), folder=tmp_path / name, observe=seen)
            with suppress(InjectedError):
                method.immunise(model, roles(), how)
        ends.append([bits(p) for p in model.network.parameters()])
        logs.append((tmp_path / name / "metrics.jsonl").read_text())
    assert ends[0] == ends[1]
    assert logs[0] == logs[1]
    assert 0 < seen.rows[6]["rollbacks"] < 6
    with pytest.raises(ResumeError, match="loop"):
        method.immunise(made(), roles(), replace(run(6, lr=2e-2, clip=1.0), folder=tmp_path / "whole"))


def test_the_log_has_the_rate_of_the_run_and_every_place_of_the_walk():
    seen = Cut(None)
    replace(FAR, rollback=0.5).immunise(small(), roles(), replace(run(2), observe=seen))
    assert [seen.rows[i]["lr/loop"] for i in (1, 2)] == [1e-3, 5e-4]
    assert {"nll/probe", "nll/alignment", "nll/harmful", "nll/harmful@2", "kl-from-uniform/heldout@3"} <= set(
        seen.rows[2]
    )


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_it_runs_in_bf16_with_gradient_checkpointing_and_micro_batches(trains):
    model = made("llama", trains)
    model.network.gradient_checkpointing_enable({"use_reentrant": False})
    seen = Cut(None)
    how = run(2, autocast="bf16", micro_batch=2)
    SOPHON(lookahead=2, reinforce=1, kl=0.5).immunise(model, roles(), replace(how, observe=seen))
    assert all(p.isfinite().all() for p in model.network.parameters())
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
    assert seen.rows[2]["direction_norm"] > 0


def test_a_fresh_lora_attacker_over_full_weights_and_none_over_an_adapter():
    method = SOPHON(attacker="lora", lookahead=2, reinforce=1, lr=1e-2)
    theta = Theta(tiny.gpt2())
    torch.manual_seed(0)
    assert method.suppression(theta, harmful(2)).norm() > 0
    full = small()
    assert not method.problems(full)
    assert [p.where for p in method.problems(attach(small(), LoRA(r=2)))] == ["attacker"]


def test_what_it_declares_and_refuses():
    model = made()
    assert SOPHON().mechanisms == (LookAhead(steps=8, radius=1e-4, rule="adamw"), Unlearning(), Conditioning())
    assert SOPHON(alpha=0.0).mechanisms == ()
    assert [p.where for p in SOPHON(alpha=0.0).problems(model)] == ["alpha"]
    paper, ice = SOPHON.paper(), SOPHON.ice()
    assert (paper.outer, paper.alpha, paper.beta, paper.reinforce, paper.lookahead) == ("uniform", 1.0, 1.0, 5, 50)
    assert (ice.outer, ice.alpha, ice.beta, ice.reinforce, ice.lookahead) == ("ice", 3.0, 5.0, 1, 50)
    assert {(one.attacker, one.lr, one.clip, one.kl) for one in (paper, ice)} == {("sgd", 1e-4, 0.5, 0.0)}
    with pytest.raises(SettingsError, match="1 harmful row"):
        SOPHON().immunise(model, roles(), replace(run(1), default_batch_size=1))
    with pytest.raises(SettingsError, match="schedule-free"):
        SOPHON().immunise(model, roles(), run(1, optimizer="schedulefree"))
    zero = ("lookahead", "reinforce", "lr", "beta", "clip")
    for bad in ({"alpha": -1.0}, {"kl": -1.0}, {"rollback": -0.1}, *({name: 0} for name in zero)):
        with pytest.raises(SettingsError):
            SOPHON(**bad)
