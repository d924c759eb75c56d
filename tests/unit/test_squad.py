"""Squads: LoRA attacks on a small model form a fleet by themselves, and leave the records that they leave alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from immunity.attacks import fleet
from immunity.attacks.attack import Opening
from immunity.bench import pool, squad, store
from immunity.bench.assault import Assault, Broken
from immunity.bench.squad import Squad, alone, grouped, parted, pays
from immunity.bench.worker import Outcome
from immunity.errors import ModelError
from released import HOT, LORA, KilledError, Watch, data, recipe, release, suite

ATTACKS = {
    "one": LORA,
    "two": replace(LORA, seed=2, steps=7, lr=1e-3, r=4, n=8),
    "hot": replace(LORA, steps=20, lr=5e-2, r=4),
}


@pytest.fixture(autouse=True)
def fleets(monkeypatch) -> None:
    """As on an accelerator."""
    monkeypatch.setattr(squad, "pays", lambda _: True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return release(tmp_path_factory.mktemp("released") / "model")


def job(name, attack, model, folder: Path, **changes) -> Assault:
    settings = {
        "name": name,
        "defence": model,
        "attack": attack,
        "opening": Opening(source=model, device="cpu"),
        "data": data(),
        "suite": suite(),
        "folder": folder / name,
        "recipe": recipe(name, attack, "lora"),
        "stop": Broken(phi=0.1),
    }
    return Assault(**settings | changes)


def jobs(model, folder) -> list[Assault]:
    return [job(name, attack, model, folder) for name, attack in ATTACKS.items()]


def run(todo, watch=None) -> list[Outcome]:
    watch = watch or Watch()
    with watch.shown(todo, []) as shown:
        return pool.run(todo, workers=1, threads=1, progress=shown)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_record(mine, its) -> None:
    """The same but for the time, and for rounding."""
    for record in (mine, its):
        for point in record["curve"]["points"]:
            point["seconds"] = 0.0
    metrics = [[point.pop("metrics") for point in record["curve"]["points"]] for record in (mine, its)]
    scores = [[point.pop("per_prompt") for point in record["curve"]["points"]] for record in (mine, its)]
    ends = [record["curve"].pop("training") for record in (mine, its)]
    assert mine == its
    for a, b in zip(*metrics, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(*scores, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5)
    for end in ("first", "last"):
        assert ends[0][end] == pytest.approx(ends[1][end], abs=1e-4)


# Who goes together


def test_lora_attacks_on_one_model_are_one_squad(model, tmp_path):
    todo = [
        *jobs(model, tmp_path),
        job("full", HOT, model, tmp_path),
        job("guarded", replace(LORA, guard="benign"), model, tmp_path),
        job("other", LORA, model, tmp_path, opening=Opening(source=model, device="cpu", max_length=48)),
    ]
    found = grouped(todo)
    squads = [one for one in found if isinstance(one, Squad)]
    assert [one.members for one in squads] == [tuple(todo[:3])]
    assert [one for one in found if not isinstance(one, Squad)] == [todo[3], todo[4], todo[5]]
    (one,) = squads
    assert one.steps == 20
    assert one.measured_at == {0, 1, 2, 3, 5, 7, 10, 20}
    assert one.title == f"attack {model}: 3 attacks as a fleet"
    assert one.folder.parent == tmp_path


def test_no_fleet_is_larger_than_it_may_be(model, tmp_path):
    todo = [job(f"a{i}", replace(LORA, seed=i), model, tmp_path) for i in range(squad.MOST + 1)]
    found = grouped(todo)
    assert [type(one) for one in found] == [Squad, Assault]
    assert len(found[0].members) == squad.MOST


def test_other_members_are_another_folder(model, tmp_path):
    todo = jobs(model, tmp_path)
    folders = {grouped(some)[0].folder for some in (todo, todo[1:], todo[:2])}
    assert len(folders) == 3
    assert grouped(todo)[0].folder == grouped(todo[::-1])[0].folder


def test_a_fleet_pays_on_an_accelerator(model, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "auto"):
        assert not pays(Opening(source=model, device=device))
    assert grouped(jobs(model, tmp_path)) == jobs(model, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pays(Opening(source="org/name", device="auto"))
    assert pays(Opening(source="org/name", device="cuda:0"))
    assert not pays(Opening(source="org/name", device="cpu"))


# What it leaves


def test_records_are_those_of_the_attacks_alone(model, tmp_path):
    apart = run(jobs(model, tmp_path / "alone"))
    (outcome,) = run(grouped(jobs(model, tmp_path / "fleet")))
    together = list(parted(outcome))
    assert [one.job.title for one in together] == [one.job.title for one in apart]
    assert "broken" in apart[2].record["curve"]["ended"], "one ends early, the others do not"
    assert apart[0].record["curve"]["ended"] == apart[1].record["curve"]["ended"] == ""
    for mine, its in zip(together, apart, strict=True):
        same_record(mine.record, its.record)
        assert mine.record == mine.record | {"kind": "attack"}
    assert not list((tmp_path / "fleet").rglob("checkpoint-*"))


def test_fewer_looks_are_the_same_attack_measured_less_often(model, tmp_path):
    whole, few = jobs(model, tmp_path / "whole")[1], replace(jobs(model, tmp_path / "few")[1], looks=3)
    assert (few.attack.budgets, few.at) == ((0, 1, 2, 3, 5, 7), (0, 2, 7))
    assert few.measured_at == set(few.at)
    assert "looks" not in whole.identity(), "what was run before there were fewer looks is the same run still"
    assert few.identity() == {**whole.identity(), "looks": 3}
    all_of_it, some = (outcome.record["curve"]["points"] for outcome in run([whole, few]))
    assert [point["step"] for point in some] == list(few.at)
    same = [point for point in all_of_it if point["step"] in few.at]
    assert [point["metrics"] for point in some] == [point["metrics"] for point in same]
    fleet = [replace(one, looks=3) for one in jobs(model, tmp_path / "fleet")[:2]]
    (outcome,) = run(grouped(fleet))
    for one in parted(outcome):
        assert [point["step"] for point in one.record["curve"]["points"]] == list(one.job.at)


def test_done_before_it_is_kept(model, tmp_path):
    first = jobs(model, tmp_path)[1]
    run([first])
    before = files(first.folder)
    watch = Watch()
    (outcome,) = run(grouped(jobs(model, tmp_path)), watch)
    assert files(first.folder) == before
    assert [one.record is not None for one in parted(outcome)] == [True] * 3
    everything = files(tmp_path)
    watch = Watch()
    (outcome,) = run(grouped(jobs(model, tmp_path)), watch)
    assert watch.computed == []
    assert files(tmp_path) == everything


def test_all_members_done_before_there_was_a_squad(model, tmp_path):
    apart = run(jobs(model, tmp_path))
    watch = Watch()
    (outcome,) = run(grouped(jobs(model, tmp_path)), watch)
    assert watch.computed == []
    assert [one.record for one in parted(outcome)] == [one.record for one in apart]


def test_killed_it_goes_on(model, tmp_path):
    todo = [job(name, replace(a, steps=23, lr=5e-3, n=8), model, tmp_path) for name, a in ATTACKS.items()]
    todo = [replace(one, attack=replace(one.attack, seed=i)) for i, one in enumerate(todo)]
    with pytest.raises(KilledError):
        run(grouped(todo), Watch(at=("fleet", 21)))
    assert all(one.kept() is None for one in todo)
    assert all(list(one.folder.glob("checkpoint-*")) for one in todo)
    (outcome,) = run(grouped(todo))
    whole = run([replace(one, folder=tmp_path / "whole" / one.name) for one in todo])
    for mine, its in zip(parted(outcome), whole, strict=True):
        same_record(mine.record, its.record)


def test_told_are_the_steps_of_the_furthest_once_each(model, tmp_path):
    steps = []
    (one,) = grouped(jobs(model, tmp_path))
    one(lambda done, _: steps.append(done))
    assert steps == sorted(set(steps))
    assert steps[0] == 0


# What fails


def test_a_fleet_that_fails_gives_every_member_an_outcome(model, tmp_path, monkeypatch):
    kept = jobs(model, tmp_path)[0]
    run([kept])

    def broken(*_args, **_more):
        raise ModelError("no such model")

    works = fleet.run_fleet
    monkeypatch.setattr(fleet, "run_fleet", broken)
    (outcome,) = run(grouped(jobs(model, tmp_path)))
    found = list(parted(outcome))
    assert [one.job.name for one in found] == ["one", "two", "hot"]
    assert [one.record is None for one in found] == [False, True, True]
    assert [one.error for one in found] == ["", "no such model", "no such model"]
    assert [one.refused for one in found] == [False, True, True]
    monkeypatch.setattr(fleet, "run_fleet", works)
    (outcome,) = run(grouped(jobs(model, tmp_path)))
    assert all(one.record for one in parted(outcome)), "and the same call goes on"


def test_a_fault_leaves_its_traceback_to_every_member(model, tmp_path, monkeypatch):
    def broken(*_args, **_more):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(fleet, "run_fleet", broken)
    (outcome,) = run(grouped(jobs(model, tmp_path)))
    for one in parted(outcome):
        assert one.error == "RuntimeError: shapes differ"
        assert "Traceback" in one.details
        assert not one.refused
        assert not (one.job.folder / store.JOB).exists(), "the folder is free for other settings"


def test_an_outcome_of_one_attack_is_itself(model, tmp_path):
    outcome = Outcome(jobs(model, tmp_path)[0], None, "why")
    assert list(parted(outcome)) == [outcome]


def test_what_a_failed_fleet_left_is_tried_alone(model, tmp_path):
    todo = jobs(model, tmp_path)
    run([todo[0]])
    store.write(todo[1].folder / store.JOB, {"another": "run"})
    together = run(grouped(todo))
    assert together[0].refused
    found = list(parted(together[0]))
    assert [one.record is None for one in found] == [False, True, True]
    assert all("two holds an unfinished run with other settings" in one.error for one in found[1:])
    assert alone(together) == todo[1:]
    assert [one.record is None for one in run(alone(together))] == [True, False]
    assert alone(run(todo)) == []
    assert alone(run(grouped([todo[0], todo[2]]))) == []
