"""Interventions that are fitted again and again: the best is used, weights stay, rows that judge train nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from immunity.attacks import intervene
from immunity.attacks.attack import Opening
from immunity.attacks.curve import Recorder
from immunity.attacks.intervene import Intervene
from immunity.attacks.restricted import few, tokens
from immunity.batch import Batch
from immunity.errors import DataError, DivergedError, SettingsError
from immunity.losses import nll
from immunity.models import load, save
from immunity.testing import tiny
from immunity.testing.check_attack import Seen
from immunity.testing.watch import InjectedError, corpus, picture, require_same

DATA = {"harmful": corpus("harmful", 12)}
ATTACK = Intervene(n=8, depths=(0.0, 1.0), restarts=2, steps=6, batch_size=4, lr=3e-2)


class Looks:
    """The NLL of all rows, and of those by which edits are chosen."""

    def __init__(self, model, n=8):
        rows = tokens(model, few(DATA, n, "test")).rows
        self.batch, self.judge = Batch(rows, "harmful"), Batch(rows[: max(1, n // 4)], "judge")

    def __call__(self, model):
        with torch.no_grad():
            all_, judge = (float(nll(model.network, batch).mean()) for batch in (self.batch, self.judge))
        return Seen({"nll": all_, "judge": judge}, {}, {}, [])


def run(attack, stop=None):
    model = tiny.language_model()
    model.network.requires_grad_(False)
    before, traces = picture(model.network), {}

    def then(done, trace):
        traces[done] = dict(trace)
        if done == stop:
            raise KeyboardInterrupt

    recorder = Recorder(measure=Looks(model, attack.n), at=attack.budgets, then=then)
    try:
        assert attack.tamper(model, attack.reads(DATA), recorder) is model
    except KeyboardInterrupt:
        assert stop is not None
    require_same(before, model.network, "after the attack")
    return recorder.points, traces


@pytest.mark.parametrize("where", ["input", "output"])
def test_the_best_of_all_edits_is_used_and_nothing_is_in_the_weights(where):
    points, traces = run(replace(ATTACK, where=where))
    assert [point.step for point in points] == [0, 1, 2, 3, 4]
    values = [traces[done]["nll/judge"] for done in (1, 2, 3, 4)]
    assert len(set(values)) == 4, "every start and block gives another edit"
    assert [traces[done]["block"] for done in (1, 2, 3, 4)] == [0.0, 1.0, 0.0, 1.0]
    for point, least in zip(points[1:], [min(values[: i + 1]) for i in range(4)], strict=True):
        assert point.metrics["judge"] == pytest.approx(least, rel=1e-5)
        assert traces[point.step]["best"] == least
    assert points[-1].metrics["nll"] < points[0].metrics["nll"] - 0.05
    costs = [(p.examples, p.tokens, p.flops) for p in points]
    assert costs == sorted(costs)
    assert costs[0] == (0, 0, 0.0)
    assert costs[-1][0] == 4 * (6 * 4 + 2)


def test_other_seeds_give_other_edits_and_the_same_ones_the_same():
    first = [p.metrics for p in run(ATTACK)[0]]
    assert first == [p.metrics for p in run(ATTACK)[0]]
    assert first[1:] != [p.metrics for p in run(replace(ATTACK, seed=2))[0]][1:]


def test_rows_that_judge_train_nothing():
    """With other answers in the rows that judge, each edit is the same: its NLL on the others does not change."""
    swapped = corpus("harmful", 12)
    rows = list(swapped.examples)
    rows[0], rows[1] = replace(rows[0], response="Quite another answer."), replace(rows[1], response="And one more.")
    one = replace(ATTACK, depths=(1.0,), restarts=1)
    values = []
    for data in (DATA, {"harmful": replace(swapped, examples=tuple(rows))}):
        model = tiny.language_model()
        model.network.requires_grad_(False)
        trained_on = Batch(tokens(model, few(DATA, 8, "test")).rows[2:], "harmful")

        def measure(model, batch=trained_on):
            with torch.no_grad():
                return Seen({"nll": float(nll(model.network, batch).mean())}, {}, {}, [])

        recorder = Recorder(measure=measure, at=one.budgets)
        one.tamper(model, one.reads(data), recorder)
        values.append([point.metrics["nll"] for point in recorder.points])
    assert values[0] == values[1]


def test_a_single_row_trains_and_judges():
    points, _ = run(replace(ATTACK, n=1))
    assert points[-1].metrics["nll"] != points[0].metrics["nll"]


def test_edits_that_do_not_stay_finite_are_left_out(monkeypatch):
    def diverge(*args):
        raise DivergedError("made to")

    monkeypatch.setattr(intervene, "descend", diverge)
    points, traces = run(ATTACK)
    assert {point.metrics["nll"] for point in points} == {points[0].metrics["nll"]}
    assert traces[4]["best"] == float("inf")


def test_hooks_are_gone_when_it_is_cut_off():
    run(ATTACK, stop=2)


def test_it_resumes(tmp_path):
    save(tiny.language_model(), tmp_path / "model")
    opening = Opening(source=str(tmp_path / "model"), device="cpu")
    looks = Looks(load(str(tmp_path / "model"), device="cpu"))
    whole = ATTACK.run(opening, DATA, looks)

    def stop(done, trace):
        if done == 3:
            raise InjectedError("injected")

    with pytest.raises(InjectedError):
        ATTACK.run(opening, DATA, looks, folder=tmp_path / "run", observe=stop)
    again = ATTACK.run(opening, DATA, looks, folder=tmp_path / "run")
    assert [(p.step, p.metrics, p.tokens) for p in again.points] == [
        (p.step, p.metrics, p.tokens) for p in whole.points
    ]


def test_settings_and_data_are_looked_at():
    wrong = {"where": "mlp", "rank": 0, "restarts": 0, "depths": (1.5,), "lr": 0.0, "n": 0, "seed": -1}
    for name, value in wrong.items():
        with pytest.raises(SettingsError, match=name):
            Intervene(**{name: value})
    with pytest.raises(SettingsError, match="depths"):
        Intervene(depths=())
    with pytest.raises(DataError, match="harmful"):
        ATTACK.reads({})
    assert not ATTACK.stays
