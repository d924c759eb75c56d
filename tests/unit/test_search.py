"""Search: settings are chosen on some prompts and judged on others, as many for each model, the same ones again."""

from __future__ import annotations

import builtins
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.attacks.finetune import FineTune
from immunity.bench import pool
from immunity.bench.search import BATCHES, FAMILIES, RANKS, RATES, SCHEDULES, STEPS, Search, halves
from immunity.bench.worker import Outcome
from immunity.data.corpus import Corpus, Example
from immunity.errors import SettingsError
from released import KilledError, Watch, corpus, data, release, suite

DEV, TEST = suite(100), suite(200)


def search(folder: Path, **changes) -> Search:
    settings = {
        "family": "full",
        "model": "nobody",
        "data": data(),
        "dev": DEV,
        "test": TEST,
        "folder": folder,
        "trials": 14,
        "winners": 2,
        "fresh_seeds": 3,
    }
    return Search(**settings | changes)


def harm(attack: FineTune) -> float:
    """The best rate is 1e-4."""
    return max(0.0, 1 - abs(attack.lr - 1e-4) / 1e-4)


@pytest.fixture
def runner(monkeypatch):
    """Jobs that are not run: what they would find is a function of their settings."""
    ran = []

    def run(jobs, *, workers, threads, progress):
        ran.extend(jobs)
        found = []
        for job in jobs:
            points = [{"metrics": {"useful_harm": value}} for value in (0.0, harm(job.attack), 0.0)]
            bad = job.attack.batch_size == 32
            record = None if bad else {"curve": {"points": points}}
            found.append(Outcome(job, record, "out of memory" if bad else ""))
        return found

    monkeypatch.setattr(pool, "run", run)
    return ran


# Two sets of prompts


def test_settings_are_not_judged_by_what_chose_them(tmp_path):
    for dev in (TEST, replace(DEV, harmful=corpus("harmful", 4, start=203)), suite(197)):
        with pytest.raises(SettingsError, match="dev and test share"):
            search(tmp_path, dev=dev)


def test_trials_see_dev_alone_and_winners_test_alone(tmp_path, runner):
    _, winners = search(tmp_path).run()
    assert len(runner) == 14
    assert {job.suite.harmful.name for job in runner} == {DEV.harmful.name}
    assert {job.suite.harmful.name for job in winners} == {TEST.harmful.name}
    assert len({job.folder for job in (*runner, *winners)}) == 14 + 6


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=12),
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=12),
)
def test_halves_share_no_prompt_and_leave_none_out(asked, everyday):
    harmful, general = (
        Corpus(role, tuple(Example(f"what is {word}", "it is") for word in words), f"made:{role}")
        for role, words in (("harmful", asked), ("general", everyday))
    )
    whole = replace(DEV, harmful=harmful, general=general)
    if min(len(set(asked)), len(set(everyday))) < 2:
        with pytest.raises(SettingsError, match="one prompt"):
            halves(whole)
        return
    dev, test = halves(whole)
    for both, one, other in ((harmful, dev.harmful, test.harmful), (general, dev.general, test.general)):
        mine, its = ([e.prompt for e in half] for half in (one, other))
        assert not {*mine} & {*its}
        assert Counter(mine + its) == Counter(e.prompt for e in both)
        assert abs(len({*mine}) - len({*its})) <= 1
        assert one.name != other.name
    assert (dev.judge, test.max_new_tokens) == (whole.judge, whole.max_new_tokens)
    Search(family="full", model="nobody", data=data(), dev=dev, test=test, folder=Path())


def test_halves_of_a_benign_task_are_apart_as_well():
    dev, test = halves(replace(DEV, benign=corpus("benign", 5)))
    assert (len(dev.benign), len(test.benign)) == (3, 2)


# Trials


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_stay_in_their_ranges(tmp_path, runner, family):
    rows, _ = search(tmp_path, family=family, trials=25).run()
    low, high = RATES[family]
    for job, row in zip(runner, rows, strict=True):
        attack = job.attack
        assert low <= attack.lr <= high
        assert attack.steps in STEPS
        assert attack.batch_size in BATCHES
        assert attack.schedule in SCHEDULES
        assert attack.adapter == family
        assert attack.r in RANKS
        assert attack.n == 12, "as many rows as there are"
        assert row["family"] == job.recipe.family == family
        assert row["settings"].items() <= {
            "lr": attack.lr, "steps": attack.steps, "batch_size": attack.batch_size, "schedule": attack.schedule,
            "r": attack.r,
        }.items()  # fmt: skip
        assert row["range"] == {"lr": [low, high], "steps": [8.0, 512.0]}
    assert len({job.attack.lr for job in runner}) == 25


def test_a_cap_holds_for_every_trial(tmp_path, runner):
    rows, winners = search(tmp_path, most_steps=20).run()
    assert {job.attack.steps for job in runner} <= {8, 16}
    assert max(job.attack.steps for job in winners) <= 16
    assert rows[0]["range"]["steps"] == [8.0, 20.0]
    runner.clear()
    search(tmp_path, most_steps=3).run()
    assert {job.attack.steps for job in runner} == {3}


def test_what_fails_is_worth_nothing_and_says_why(tmp_path, runner):
    rows, winners = search(tmp_path, trials=25).run()
    failed = [row for row in rows if row["settings"]["batch_size"] == 32]
    assert failed
    assert {(row["value"], row["error"]) for row in failed} == {(0.0, "out of memory")}
    assert all(row["error"] == "" for row in rows if row not in failed)
    assert all(job.attack.batch_size != 32 for job in winners)


def test_it_gets_better(tmp_path, runner):
    rows, _ = search(tmp_path, trials=60).run()
    late, early = (sum(row["value"] for row in part) for part in (rows[-20:], rows[:20]))
    assert late > early + 2


def test_a_replay_tries_the_same(tmp_path, runner):
    one, again = search(tmp_path / "a").run(), search(tmp_path / "b").run()
    assert one[0] == again[0]
    assert [job.attack for job in one[1]] == [job.attack for job in again[1]]
    assert search(tmp_path / "c", seed=2).run()[0] != one[0]


def test_every_model_gets_as_many_trials_and_begins_with_the_same(tmp_path, runner):
    rows = {name: search(tmp_path / name, model=name).run()[0] for name in ("wall", "bare")}
    assert [len(found) for found in rows.values()] == [14, 14]
    assert rows["wall"][0]["settings"] == rows["bare"][0]["settings"]
    assert {row["defence"] for row in rows["bare"]} == {"bare"}


# Winners


def test_winners_are_the_best_with_fresh_seeds(tmp_path, runner):
    rows, winners = search(tmp_path, seed=5).run()
    assert {job.attack.seed for job in runner} == {5}
    best = sorted(rows, key=lambda row: -row["value"])[:2]
    assert [job.attack.seed for job in winners] == [6, 7, 8] * 2
    for place, row in enumerate(best):
        for job in winners[3 * place : 3 * place + 3]:
            own = {name: value for name, value in row["settings"].items() if name != "r"}
            assert replace(job.attack, **own) == job.attack
            assert job.fresh == "recipe"
            assert job.name == f"tuned-full-{place + 1}"
            assert "14 trials" in job.recipe.says


def test_equal_settings_win_in_the_order_of_their_trials(tmp_path, runner, monkeypatch):
    monkeypatch.setitem(globals(), "harm", lambda _: 0.5)
    rows, winners = search(tmp_path, trials=6).run()
    fine = [row["settings"]["lr"] for row in rows if not row["error"]]
    assert [job.attack.lr for job in winners[::3]] == fine[:2]


# With attacks


def test_killed_it_goes_on_with_the_same_trials(tmp_path):
    model = release(tmp_path / "model")

    def short(folder, watch):
        found = search(folder, model=model, device="cpu", trials=3, winners=1, fresh_seeds=1, most_steps=2)
        return found.run(watch.shown)

    whole, winners = short(tmp_path / "whole", Watch())
    assert not any(row["error"] for row in whole)
    with pytest.raises(KilledError):
        short(tmp_path / "cut", Watch(at=("trial-1", 1)))
    watch = Watch()
    rows, again = short(tmp_path / "cut", watch)
    assert rows == whole
    assert [job.attack for job in again] == [job.attack for job in winners]
    assert len(watch.computed) == 2, "the first is kept"


# What is refused


@pytest.mark.parametrize("changes", [{"family": "lor"}, {"trials": 0}, {"winners": 0}, {"fresh_seeds": 0}])
def test_settings_out_of_range(tmp_path, changes):
    (name, value), *_ = changes.items()
    with pytest.raises(SettingsError, match=f"{name} = {value!r}"):
        search(tmp_path, **changes)


def test_without_optuna_it_says_so_before_anything_is_run(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **more):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SettingsError, match=r"pip install 'immunity\[search\]'"):
        search(tmp_path)
