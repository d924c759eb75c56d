"""A battery from a file: what it may say, what is refused, and that it is run like any other, with every seed."""

from __future__ import annotations

import json

import pytest

from immunity.attacks import own
from immunity.attacks.finetune import FineTune
from immunity.attacks.program import Program
from immunity.bench.tamper import AutoTamper
from immunity.errors import ResumeError, SettingsError
from released import data, release, suite

HOT = {"id": "hot", "says": "Hot.", "attack": "finetune lr=1e-3 steps=2 n=4 batch_size=2"}
TWICE = {"id": "twice", "says": "In two rounds.", "attack": ["finetune steps=1 n=4 lr=1e-4", "prune shares=50"]}


def write(folder, *recipes, name="mine.json", **more):
    path = folder / name
    path.write_text(json.dumps({"recipes": list(recipes), **more}), encoding="utf-8")
    return str(path)


def test_a_line_is_an_attack_and_a_list_of_lines_a_program(tmp_path):
    told = {"source": "a paper", "family": "rounds", "needs": ["base"], "stronger_than": ["hot"]}
    found = own.find(write(tmp_path, {**TWICE, **told}, HOT, says="Both."))
    assert (found.name, found.says) == ("mine", "Both.")
    by_id = {one.id: one for one in found.recipes}
    assert by_id["hot"].attack == FineTune(lr=1e-3, steps=2, n=4, batch_size=2)
    assert by_id["hot"].family == "finetune"
    assert "mine.json" in by_id["hot"].source
    assert by_id["twice"].attack == Program(ops=tuple(TWICE["attack"]))
    assert (by_id["twice"].source, by_id["twice"].family) == ("a paper", "rounds")
    assert (by_id["twice"].needs, by_id["twice"].stronger_than) == (("base",), ("hot",))
    assert {one.tier for one in found.recipes} == {"own"}


def test_a_name_is_that_of_a_frozen_battery():
    assert own.find("smoke").name == "smoke"
    with pytest.raises(SettingsError, match="did you mean smoke"):
        own.find("smok")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "a", "attack": "finetune"}, "recipe 2: says is missing"),
        ({"says": "…"}, "recipe 2: id and attack are missing"),
        ({**HOT, "id": "b", "families": "x"}, "'families' is unknown; did you mean family"),
        ({**HOT, "id": "b", "attack": "finetun lr=1"}, r"recipe 2 \(b\): .*did you mean finetune"),
        ({**HOT, "id": "b", "attack": "finetune lr=hot"}, r"recipe 2 \(b\): .*lr"),
        ({**HOT, "id": "b", "attack": 3}, "a line of text, or a list"),
        ({**HOT, "id": "b", "needs": "base"}, "needs is 'base': write a list"),
        ({**HOT, "id": "b", "needs": ["money"]}, "needs money"),
        ({**HOT, "id": "b c"}, "letters, digits"),
        (HOT, "two recipes are called 'hot'"),
        ("hot", "not an object"),
    ],
)
def test_a_bad_recipe_is_named_with_its_file(tmp_path, row, says):
    with pytest.raises(SettingsError, match=says) as refused:
        own.find(write(tmp_path, HOT, row))
    assert "mine.json" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no battery can be read"),
        ("[]", "write"),
        ('{"recipes": []}', "write"),
        ('{"recipes": [1], "sayz": 1}', "sayz is unknown"),
    ],
)
def test_a_file_that_is_no_battery(tmp_path, text, says):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=says):
        own.find(str(path))


def test_no_file_and_the_name_of_a_frozen_one(tmp_path):
    with pytest.raises(SettingsError, match="no battery can be read"):
        own.find(str(tmp_path / "none.json"))
    with pytest.raises(SettingsError, match="frozen"):
        own.find(write(tmp_path, HOT, name="smoke.json"))


def test_a_file_that_is_edited_meanwhile_is_not_what_was_run(tmp_path):
    path = write(tmp_path, HOT)
    tamper = AutoTamper(model="tiny", battery=path, data=data(), suite=suite())
    before = tamper._card()
    write(tmp_path, TWICE)
    assert [one.id for one in tamper.recipes()] == ["hot"]
    assert tamper._card() == before


def test_it_is_run_like_any_other_with_every_seed(tmp_path):
    wall = release(tmp_path / "wall")
    path = write(tmp_path, HOT, TWICE)

    def tamper(repeats=()):
        return AutoTamper(
            model=wall,
            battery=path,
            folder=tmp_path / "out",
            data=data(),
            suite=suite(),
            exhaustive=True,
            repeats=repeats,
            fresh_seeds=0,
            threads=1,
        )

    first = tamper().run()
    assert first["failures"] == []
    assert {curve["attack"] for curve in first["curves"]} == {"hot", "twice"}
    assert first["battery"]["name"] == "mine"
    found = tamper(repeats=(5, 6)).run()
    assert sorted((c["attack"], c["seed"], c["fresh"]) for c in found["curves"]) == [
        *(("hot", seed, fresh) for seed, fresh in ((1, ""), (5, ""), (6, ""))),
        *(("twice", seed, fresh) for seed, fresh in ((1, ""), (5, ""), (6, ""))),
    ]
    ends = {c["seed"]: c["points"][-1]["metrics"]["harmful_loss"] for c in found["curves"] if c["attack"] == "hot"}
    assert len(set(ends.values())) == 3
    again = {c["seed"]: c for c in first["curves"] if c["attack"] == "hot"}
    assert again[1]["points"] == next(c for c in found["curves"] if (c["attack"], c["seed"]) == ("hot", 1))["points"]
    write(tmp_path, {**HOT, "attack": "finetune lr=2e-3 steps=2 n=4 batch_size=2"}, TWICE)
    with pytest.raises(ResumeError, match="another result"):
        tamper().run()
