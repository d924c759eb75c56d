"""AutoTamper: a battery from end to end on a tiny model, whatever crashes, is killed, or breaks it at once."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from immunity.attacks import battery
from immunity.attacks.ask import Ask
from immunity.attacks.attack import Opening
from immunity.attacks.battery import Battery, cascade, cost, stages
from immunity.attacks.edits import Quantise
from immunity.attacks.finetune import FineTune
from immunity.bench import jobs, squad, store
from immunity.bench.tamper import AutoTamper
from immunity.bench.tampered import TRACEBACK, inapplicable
from immunity.errors import DataError, ModelError, ResumeError, SettingsError
from immunity.fit import Fit
from immunity.measure.harm import OverlapJudge
from immunity.method import Run
from immunity.methods.ctrap import CTRAP
from immunity.methods.sft import SFT
from released import COLD, HOT, LORA, KilledError, Watch, corpus, data, recipe, release, suite

PREFILL = recipe("ask", Ask(style="prefill"), "prompting")
CRASH = recipe("crash", Ask(template="no such template"), "prompting")
WEAK = recipe("weak", COLD)
FIRST = recipe("first", LORA, "lora")
SECOND = recipe("second", replace(LORA, steps=6, lr=1e-3), "lora")
STRONG = recipe("strong", replace(HOT, steps=50))  # 300 rows: a later stage
LATER = recipe("later", replace(HOT, steps=300, lr=1e-5))
HOLDS = (CRASH, PREFILL, WEAK, FIRST, SECOND)
"""A battery that the model withstands."""
BREAKS = (PREFILL, WEAK, STRONG, LATER)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("released")
    return release(folder / "wall"), release(folder / "bare", seed=1)


@pytest.fixture
def fleets(monkeypatch) -> None:
    """As on an accelerator."""
    monkeypatch.setattr(squad, "pays", lambda _: True)


@pytest.fixture
def tiny_battery(monkeypatch):
    def use(*recipes) -> None:
        one = Battery("smoke", "For a test.", cascade(recipes))
        monkeypatch.setattr(battery, "BATTERIES", {"smoke": one})

    return use


def tamper(folder: Path, *models: str, **changes) -> AutoTamper:
    settings = {
        "model": models[0],
        "baselines": models[1:],
        "battery": "smoke",
        "folder": folder,
        "data": data(),
        "suite": suite(),
        "device": "cpu",
        "fresh_seeds": 0,
    }
    return AutoTamper(**settings | changes)


def timeless(result):
    """A result without what differs from one run to the next."""
    plain = json.loads(json.dumps(result))
    for name in ("command", "created", "seconds"):
        del plain[name]
    for curve in plain["curves"]:
        for point in curve["points"]:
            del point["seconds"]
    del plain["battery"]["summary"]  # which follows from the rest
    return plain


def rows(result, *names, kind="curves"):
    return sorted(tuple(row[name] for name in names) for row in result[kind])


# A whole run


@pytest.mark.usefixtures("fleets")
def test_a_result_is_complete(models, tmp_path, tiny_battery):
    tiny_battery(*HOLDS)
    watch = Watch()
    result = tamper(tmp_path, *models).run(watch.shown)
    assert result == store.read(tmp_path / store.RESULT)
    names = ("ask", "first", "second", "weak")
    assert rows(result, "defence", "attack", "seed") == sorted((m, name, 1) for m in models for name in names)
    assert {curve["fresh"] for curve in result["curves"]} == {""}
    assert rows(result, "defence", "attack", kind="failures") == sorted((m, "crash") for m in models)
    for row in result["failures"]:
        assert "unknown template 'no such template'" in row["error"]
        assert row["recipe"]["id"] == "crash"
    assert result["skipped"] == []
    assert {row["recipe"]["id"] for row in result["attacks"]} == set(names)
    card = result["battery"]
    assert (card["name"], card["version"], card["phi"], card["exhaustive"]) == ("smoke", battery.VERSION, 0.1, False)
    assert card["digest"] == battery.BATTERIES["smoke"].digest
    assert card["models"] == [{"model": models[0], "role": "defended"}, {"model": models[1], "role": "baseline"}]
    assert card["trials"] == []
    assert [row["model"] for row in card["summary"]["models"]] == list(models)
    assert card["summary"]["models"][0]["verdict"]
    assert {row["defence"] for row in result["verdicts"]} == set(models)
    assert sum("fleet" in title for title in watch.computed) == 2, "LoRA attacks go together, one fleet a model"


def test_a_battery_on_the_stand_ins_needs_nothing_but_a_model(models, tmp_path, tiny_battery):
    tiny_battery(recipe("quantise", Quantise(bits=(4,)), "weights"))
    result = AutoTamper(model="tiny", battery="smoke", folder=tmp_path, device="cpu", whole_curves=True).run()
    (curve,) = result["curves"]
    assert [point["step"] for point in curve["points"]] == [0, 12]
    assert result["model"]["name"] == "tiny"
    assert curve["points"][0]["metrics"]["general_accuracy"] > 0.5


def test_baselines_get_exactly_the_same_attacks(models, tmp_path, tiny_battery):
    tiny_battery(*HOLDS)
    result = tamper(tmp_path, *models, fresh_seeds=1, phi=0.0).run()
    settings = {}
    for folder in ("0", "1"):
        records = [store.read(path) for path in sorted((tmp_path / folder).glob("*/" + store.RECORD))]
        settings[folder] = {
            (r["attack"]["name"], r["curve"]["seed"]): (r["attack"]["settings"], r["identity"]["data"], r["data"])
            for r in records
            if r["kind"] == "attack"
        }
    assert settings["0"] == settings["1"]
    assert len(settings["0"]) >= 4
    assert {c["defence"] for c in result["curves"]} == set(models)


def test_a_baseline_named_twice_is_attacked_once(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    result = tamper(tmp_path, models[0], models[1], models[1], models[0]).run()
    assert len(result["curves"]) == 2


# Killed, resumed


def test_again_it_redoes_nothing_and_says_the_same(models, tmp_path, tiny_battery):
    tiny_battery(*HOLDS)
    first = tamper(tmp_path, *models).run()
    watch = Watch()
    again = tamper(tmp_path, *models).run(watch.shown)
    assert watch.computed == [], "what failed fails again, before it has measured anything"
    assert again == first, "the date and the command of the first run, too"


@pytest.mark.usefixtures("fleets")
def test_killed_it_goes_on_and_says_the_same(models, tmp_path, tiny_battery):
    tiny_battery(PREFILL, WEAK, FIRST, SECOND, STRONG)
    whole = tamper(tmp_path / "whole", models[0], whole_curves=True).run()
    for at in (("fleet", 3), ("weak", 2), ("strong", 30)):
        watch = Watch(at=at)
        with pytest.raises(KilledError):
            tamper(tmp_path / "cut", models[0], whole_curves=True).run(watch.shown)
        assert at[0] in watch.computed[-1]
        assert len(watch.computed) <= 2, "the one that was cut off before, and this one"
        assert not (tmp_path / "cut" / store.RESULT).exists()
    watch = Watch()
    result = tamper(tmp_path / "cut", models[0], whole_curves=True).run(watch.shown)
    assert timeless(result) == timeless(whole)
    assert len(watch.computed) == 1, "what was done is kept"


def test_a_crash_costs_itself_alone(models, tmp_path, tiny_battery):
    tiny_battery(CRASH, WEAK)
    result = tamper(tmp_path, models[0]).run()
    assert rows(result, "attack") == [("weak",)]
    assert rows(result, "attack", kind="failures") == [("crash",)]
    assert result["battery"]["summary"]["models"][0]["attacks"]
    tiny_battery(WEAK, replace(CRASH, attack=Ask(template="chatml")))
    with pytest.raises(ResumeError, match="digest"):
        tamper(tmp_path, models[0]).run()


@pytest.mark.parametrize(("template", "why"), [("chatml", "has no token <|im_start|>"), ("alpaca", "prompts fill 64")])
@pytest.mark.parametrize("attack", [Ask, partial(FineTune, steps=2, n=4)])
def test_what_nobody_can_ask_a_model_is_skipped_and_no_crash(models, tmp_path, tiny_battery, attack, template, why):
    source = "tiny" if template == "chatml" else models[0]  # a tokenizer without such tokens, a model of 64 positions
    tiny_battery(WEAK, CRASH, recipe("other", attack(template=template), "prompting"))
    result = tamper(tmp_path / "a", source).run()
    assert rows(result, "attack") == [("weak",)]
    assert rows(result, "attack", kind="failures") == [("crash",)]
    (skipped,) = result["skipped"]
    assert (skipped["attack"], skipped["defence"], skipped["recipe"]["id"]) == ("other", source, "other")
    assert skipped["why"].startswith(f"does not apply to this model under the template {template}: ")
    assert why in skipped["why"]
    statuses = {row["attack"]: row["status"] for row in result["battery"]["summary"]["models"][0]["attacks"]}
    assert (statuses["other"], statuses["crash"]) == ("skipped", "crashed")
    assert inapplicable(result["skipped"], source) == [
        "what cannot be tried: 1 attack does not apply to this model: other"
    ]
    assert inapplicable([*result["skipped"]] * 2, source)[0].endswith(
        "2 attacks do not apply to this model: other, other"
    )
    assert inapplicable(result["skipped"], "another") == []


def test_a_failure_that_nobody_foresaw_keeps_the_end_of_its_traceback(models, tmp_path, tiny_battery, monkeypatch):
    def breaks(*_):
        raise RuntimeError(f"no luck{'!' * 9000}")

    monkeypatch.setattr(Ask, "tamper", breaks)
    tiny_battery(PREFILL, CRASH)
    result = tamper(tmp_path, models[0]).run()
    failed = {row["attack"]: row for row in result["failures"]}
    assert failed["ask"]["details"].startswith("…")
    assert failed["ask"]["details"].endswith("!!!")
    assert len(failed["ask"]["details"]) == TRACEBACK + 1
    assert failed["ask"]["error"].startswith("RuntimeError: no luck!!!")


def test_a_failure_says_where_it_came_from_in_its_last_lines(models, tmp_path, tiny_battery, monkeypatch):
    def breaks(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Ask, "tamper", breaks)
    tiny_battery(PREFILL)
    (failed,) = tamper(tmp_path, models[0]).run()["failures"]
    assert failed["details"].startswith("Traceback")
    assert "in breaks" in failed["details"]
    assert failed["details"].endswith("RuntimeError: no luck")


@pytest.mark.usefixtures("fleets")
def test_one_that_cannot_be_in_a_fleet_does_not_take_the_others_along(models, tmp_path, tiny_battery):
    long = recipe("long", replace(LORA, template="alpaca"), "lora")  # no row fits into 64 tokens
    tiny_battery(FIRST, SECOND, long)
    result = tamper(tmp_path, models[0]).run()
    assert rows(result, "attack") == [("first",), ("second",)]
    assert not result["failures"]
    assert rows(result, "attack", kind="skipped") == [("long",)]
    assert "raise max_length" in result["skipped"][0]["why"]


def test_nothing_could_be_run(models, tmp_path, tiny_battery):
    tiny_battery(CRASH)
    result = tamper(tmp_path, models[0]).run()
    assert result["curves"] == []
    assert len(result["failures"]) == 1
    assert result["model"]["parameters"] is None


# The cascade


def test_it_stops_when_the_model_is_broken(models, tmp_path, tiny_battery):
    tiny_battery(*BREAKS)
    result = tamper(tmp_path, *models).run()
    assert {attack for (attack,) in rows(result, "attack")} == {"ask", "weak", "strong"}
    assert rows(result, "defence", "attack", "why", kind="skipped") == sorted(
        (m, "later", "broken by strong already") for m in models
    )
    assert {row["recipe"]["id"] for row in result["skipped"]} == {"later"}
    (mine,) = [c for c in result["curves"] if c["attack"] == "strong" and c["defence"] == models[0]]
    assert mine["ended"].startswith("broken")
    assert mine["points"][-1]["step"] < mine["planned"] == 50
    assert result["battery"]["summary"]["models"][0]["w1"]["value"] == 1.0


def test_exhaustive_goes_on(models, tmp_path, tiny_battery):
    tiny_battery(*BREAKS)
    first = tamper(tmp_path, models[0]).run()
    assert rows(first, "attack", kind="skipped") == [("later",)]
    watch = Watch()
    result = tamper(tmp_path, models[0], exhaustive=True, most_steps=None).run(watch.shown)
    assert rows(result, "attack") == [("ask",), ("later",), ("strong",), ("weak",)]
    assert result["skipped"] == []
    assert watch.computed == [f"attack {models[0]}: later, seed 1"], "in the same folder it does what was left out"


def test_a_baseline_that_breaks_does_not_end_it(models, tmp_path, tiny_battery):
    tiny_battery(*BREAKS)
    with_bare = tamper(tmp_path, *models, most_steps=2)
    assert with_bare._broken({}) == ""
    result = tamper(tmp_path / "x", *models).run()
    outcomes = {}
    for i, curve in enumerate(c for c in result["curves"] if c["defence"] == models[1]):
        outcomes[str(i)] = type("Outcome", (), {"record": {"curve": curve}})()
    assert max(c["points"][-1]["metrics"]["useful_harm"] for c in result["curves"] if c["defence"] == models[1]) == 1.0
    assert with_bare._broken(outcomes) == ""


def test_whole_curves_go_to_their_end(models, tmp_path, tiny_battery):
    tiny_battery(STRONG)
    (curve,) = tamper(tmp_path, models[0], whole_curves=True).run()["curves"]
    assert curve["points"][-1]["step"] == 50
    assert curve["ended"] == ""


def test_a_cap_weakens_every_attack_and_is_said(models, tmp_path, tiny_battery):
    tiny_battery(*BREAKS)
    result = tamper(tmp_path, models[0], most_steps=2).run()
    assert {curve["planned"] for curve in result["curves"]} == {0, 2}
    assert result["skipped"] == []
    assert result["battery"]["most_steps"] == 2


def test_stages_are_in_order_and_leave_nothing_out():
    recipes = battery.BATTERIES["plus"].recipes
    found = list(stages(recipes))
    assert [one for stage in found for one in stage] == list(recipes)
    assert len(found) == 4
    borders = [(cost(stage[0].attack), cost(stage[-1].attack)) for stage in found]
    assert all(a[1] < b[0] for a, b in pairwise(borders))


def test_what_the_data_lack_is_skipped_and_says_why(models, tmp_path, tiny_battery):
    tiny_battery(WEAK, recipe("mixed", replace(COLD, harmful=0.5, filler="identity")))
    result = tamper(tmp_path, *models).run()
    assert rows(result, "attack", kind="curves") == [("weak",), ("weak",)]
    assert rows(result, "defence", "attack", kind="skipped") == sorted((m, "mixed") for m in models)
    assert "give --identity" in result["skipped"][0]["why"]


def test_what_needs_the_base_is_not_run_without_it(models, tmp_path, tiny_battery):
    pair = replace(recipe("pair", replace(COLD, seed=9)), needs=("base",))
    tiny_battery(WEAK, pair)
    assert [r.id for r in tamper(tmp_path, models[0]).recipes()] == ["weak"]
    assert [r.id for r in tamper(tmp_path, models[0], base=models[1]).recipes()] == ["weak", "pair"]


# Seeds and prompts that did not choose the winner


def test_winners_get_fresh_seeds_and_fresh_prompts(models, tmp_path, tiny_battery):
    tiny_battery(PREFILL, WEAK, recipe("hot", HOT), recipe("hotter", replace(HOT, lr=3e-2)))
    result = tamper(tmp_path, *models, fresh_seeds=2, dev=suite(200), exhaustive=True).run()
    fresh = [c for c in result["curves"] if c["fresh"]]
    assert {(c["defence"], c["seed"], c["fresh"]) for c in fresh} == {
        (m, seed, kind) for m in models for seed, kind in ((2, "recipe"), (3, "recipe"), (1, "artefact"))
    }
    (winner,) = {c["attack"] for c in fresh}
    assert winner in {"hot", "hotter"}, "the best of its family, and nothing of a family without chance"
    for i, _ in enumerate(models):
        record = store.read(tmp_path / str(i) / f"{winner}-seed1-fresh" / store.RECORD)
        measured = {row["fingerprint"] for row in record["data"] if row["role"] == "measured on harmful"}
        assert measured == {suite(200).harmful.fingerprint}
        assert record["curve"]["fresh"] == "artefact"
    w1 = result["battery"]["summary"]["models"][0]["w1"]
    assert w1["attack"] == winner
    assert w1["recipe"]["seeds"] == 2
    assert w1["artefact"]["value"] == 1.0
    assert {c["points"][-1]["step"] for c in fresh} == {w1["step"]}, "as far as the winner, whoever breaks earlier"
    assert all("measured again" in c["ended"] for c in fresh)
    assert result["battery"]["summary"]["models"][0]["role"] == "defended"


def test_nothing_that_did_no_harm_gets_fresh_seeds(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    result = tamper(tmp_path, models[0], fresh_seeds=2, dev=suite(200)).run()
    assert len(result["curves"]) == 1


def test_a_tolerance_is_that_of_the_run(models, tmp_path, tiny_battery):
    tiny_battery(recipe("hot", HOT))
    one = tamper(tmp_path, models[0], fresh_seeds=1, phi=0.95)
    outcome = type("Outcome", (), {})()
    outcome.record = {"curve": {"points": [{"step": 1, "examples": 4, "metrics": {"useful_harm": 0.9}}]}}
    recipes = one.recipes()
    outcomes = {one._job(recipes[0], models[0]).title: outcome}
    assert one._again(recipes, outcomes) == []
    assert len(replace(one, phi=0.5)._again(recipes, outcomes)) == 1


# Search


def test_a_search_gives_every_model_as_many_trials(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    result = tamper(tmp_path, *models, search=1, most_steps=1, suite=replace(suite(n=4), max_new_tokens=2)).run()
    trials = result["battery"]["trials"]
    assert sorted((row["defence"], row["family"]) for row in trials) == sorted(
        (m, family) for m in models for family in ("full", "lora")
    )
    tuned = [c for c in result["curves"] if c["attack"].startswith("tuned-")]
    assert len(tuned) == 2 * 2 * 5
    assert {c["fresh"] for c in tuned} == {"recipe"}
    assert {c["n_prompts"]["harm"] for c in tuned} == {2}, "the other half chose them"


def test_a_search_that_cannot_be_is_refused_before_anything_is_run(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    with pytest.raises(SettingsError, match="one prompt"):
        tamper(tmp_path, models[0], search=1, suite=suite(n=1)).run()
    assert not list(tmp_path.iterdir())


# Adaptive


@pytest.fixture(scope="module")
def trapped(models, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hardened") / "trap"
    job = jobs.Hardening(
        name="trap",
        method=CTRAP(lookahead=1),
        opening=Opening(source=models[0], device="cpu"),
        data={role: corpus(role) for role in ("alignment", "harmful", "general")},
        run=Run(fit=Fit(steps=2, lr=1e-3), default_batch_size=4),
        folder=folder,
    )
    job(lambda *_: None)
    return str(folder / jobs.MODEL)


SCALE = FineTune(n=8, steps=1, lr=1e-4, batch_size=2)


def test_adaptive_attacks_are_those_against_the_record(models, trapped, tmp_path, caplog):
    one = tamper(tmp_path, trapped, models[0], battery="adaptive", scale=SCALE)
    ids = [r.id for r in one.recipes()]
    assert "A-radius-x3" in ids
    assert "A-avoid-sgd" in ids
    assert {r.tier for r in one.recipes()} == {"adaptive"}
    assert not caplog.records
    plain = tamper(tmp_path, models[0], battery="adaptive", scale=SCALE)
    with caplog.at_level(logging.WARNING):
        generic = [r.id for r in plain.recipes()]
    assert "no record of how it was hardened" in caplog.text
    assert set(generic) < set(ids)
    told = tamper(tmp_path, models[0], battery="adaptive", scale=SCALE, mechanisms_of=trapped)
    assert [r.id for r in told.recipes()] == ids
    assert "A-interpolate" in [r.id for r in replace(one, base=models[0]).recipes()]


def test_what_lies_under_the_last_hardening_is_attacked_too(models, trapped, tmp_path, caplog):
    again = jobs.Hardening(
        name="aligned once more",
        method=SFT(),
        opening=Opening(source=trapped, device="cpu"),
        data={"alignment": corpus("alignment")},
        run=Run(fit=Fit(steps=1, lr=1e-3), default_batch_size=4),
        folder=tmp_path / "again",
    )
    again(lambda *_: None)
    both = (str(tmp_path / "again" / jobs.MODEL), trapped)
    over, under = (tamper(tmp_path / "t", one, models[0], battery="adaptive", scale=SCALE) for one in both)
    assert [r.id for r in over.recipes()] == [r.id for r in under.recipes()]
    assert over._card()["against"] == under._card()["against"] == ["LookAhead", "Collapse"]
    assert not caplog.records
    record = store.read(tmp_path / "again" / store.RECORD)
    record["identity"]["model"]["source"] = gone = str(tmp_path / "moved" / jobs.MODEL)
    store.write(tmp_path / "again" / store.RECORD, record)
    assert replace(over)._card()["against"] == []
    assert f"was made from {gone}, which has no record" in caplog.text


def test_an_adaptive_battery_runs(models, trapped, tmp_path, monkeypatch):
    one = tamper(tmp_path, trapped, models[0], battery="adaptive", scale=SCALE, most_steps=1, exhaustive=True)
    wanted = {"A-radius-x3", "A-keep-sgd", "A-swap-adamw", "A-quantise-first"}
    monkeypatch.setattr(AutoTamper, "recipes", lambda self, real=AutoTamper.recipes: _some(real(self), wanted))
    result = one.run()
    assert {attack for (attack,) in rows(result, "attack")} == wanted
    assert result["failures"] == []
    assert [row["name"] for row in result["defences"]] == [trapped]
    assert (result["battery"]["name"], result["battery"]["digest"]) == ("adaptive", "")
    overlaps = {row["with"]: row for row in result["battery"]["overlaps"]}
    assert overlaps["the attacker's restricted rows"]["shared"] == 12, "this defence was trained on them"


def test_derived_attacks_come_beside_those_of_a_battery(models, trapped, tmp_path, tiny_battery, monkeypatch):
    tiny_battery(WEAK)
    one = tamper(tmp_path, trapped, models[0], adaptive=True, scale=SCALE, most_steps=1, exhaustive=True)
    derived = [r.id for r in replace(one, battery="adaptive", folder=tmp_path / "b").recipes()]
    assert {r.id for r in one.recipes()} == {WEAK.id, *derived}
    wanted = {WEAK.id, "A-quantise-first"}
    monkeypatch.setattr(AutoTamper, "recipes", lambda self, real=AutoTamper.recipes: _some(real(self), wanted))
    result = one.run()
    assert {(row["defence"], row["attack"]) for row in result["curves"]} == {
        (model, attack) for model in (trapped, models[0]) for attack in wanted
    }
    card = result["battery"]
    assert card["name"] == "smoke and adaptive"
    assert card["digest"] == battery.BATTERIES["smoke"].digest
    assert card["against"] == card["summary"]["against"] == ["LookAhead", "Collapse"]
    with pytest.raises(ResumeError, match='name is "smoke and adaptive", not "smoke"'):
        replace(one, adaptive=False).run()


def _some(recipes, wanted):
    return tuple(r for r in recipes if r.id in wanted)


# What is refused at once


def test_another_battery_in_the_folder_is_refused(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    tamper(tmp_path, models[0]).run()
    before = (tmp_path / store.RESULT).read_bytes()
    for other, says in (
        (tamper(tmp_path, models[1]), "models"),
        (tamper(tmp_path, models[0], most_steps=1), "most_steps"),
        (tamper(tmp_path, models[0], suite=suite(300)), "with other settings"),
        (tamper(tmp_path, models[0], data=data(harmful=11)), "with other settings"),
    ):
        with pytest.raises(ResumeError, match=says):
            other.run()
    tiny_battery(WEAK, PREFILL)
    with pytest.raises(ResumeError, match="digest"):
        tamper(tmp_path, models[0]).run()
    assert (tmp_path / store.RESULT).read_bytes() == before
    store.write(tmp_path / store.RESULT, {"curves": []})
    with pytest.raises(ResumeError, match="holds another result"):
        tamper(tmp_path, models[0]).run()


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_cannot_be_opened_is_said_at_once(models, tmp_path, tiny_battery, which):
    tiny_battery(WEAK, PREFILL)
    names = [models[0], models[0]]
    names[which] = str(tmp_path / "none")
    with pytest.raises(ModelError, match="is not a folder"):
        tamper(tmp_path / "x", *names).run()
    assert not (tmp_path / "x").exists()


def test_no_restricted_rows(models, tmp_path, tiny_battery):
    tiny_battery(WEAK)
    with pytest.raises(DataError, match="give --harmful"):
        tamper(tmp_path, models[0], data={"benign": corpus("benign")}).run()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"battery": "smok"}, "did you mean smoke"),
        ({"phi": 1.0}, "phi = 1.0"),
        ({"phi": -0.1}, "phi = -0.1"),
        ({"fresh_seeds": -1}, "fresh_seeds = -1"),
        ({"most_steps": 0}, "most_steps = 0"),
    ],
)
def test_settings_out_of_range(tmp_path, changes, says):
    with pytest.raises(SettingsError, match=says):
        tamper(tmp_path, "nobody", **changes)


# What the flags read


def test_two_judges_are_compared_where_there_is_most_harm(models, tmp_path, tiny_battery):
    tiny_battery(recipe("hot", HOT))
    result = tamper(tmp_path, models[0], suite=replace(suite(), second=OverlapJudge())).run()
    (row,) = result["battery"]["judges"]
    assert row == {"defence": models[0], "attack": "hot", "judges": ["Gave", "OverlapJudge"], "agreement": 1.0}


def test_templates_are_rows(models, tmp_path, tiny_battery):
    tiny_battery(recipe("other", Ask(template="chatml"), "prompting"))
    result = tamper(tmp_path, models[0]).run()
    assert [(row["template"], row["harm"]) for row in result["battery"]["templates"]] == [
        ("its own", 0.0),
        ("chatml", 0.0),
    ]


def test_runs_on_a_baseline_are_shared_by_what_makes_them(models, tmp_path, tiny_battery):
    tiny_battery(WEAK, PREFILL)
    wall, bare = models
    shelf, first, second = tmp_path / "shelf", Watch(), Watch()
    one = tamper(tmp_path / "1", wall, bare, shelf=shelf).run(first.shown)
    other = release(tmp_path / "other", seed=2)
    two = tamper(tmp_path / "2", other, bare, shelf=shelf).run(second.shown)
    assert {title for title in first.computed if bare in title}, "the first one runs them"
    assert not {title for title in second.computed if bare in title}, "the second one finds them"
    assert {title for title in second.computed if other in title}, "a hardened model is never on the shelf"
    mine, theirs = ([c for c in result["curves"] if c["defence"] == bare] for result in (one, two))
    assert mine == theirs and len(mine) == 2
    third = Watch()
    tamper(tmp_path / "3", other, bare, shelf=shelf, seed=5).run(third.shown)
    assert {title for title in third.computed if bare in title}, "another seed is another run"
