"""The studies of benchmarks/: their files say what there is, and their tables average over the right things."""

from __future__ import annotations

import importlib
import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from immunity.attacks import own
from immunity.methods import PRESETS
from immunity.spec import build, pairs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (BENCHMARKS / "studies").glob("*.json")}
STUDIES = {name: found for name, found in FILES.items() if "defences" in found}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.parametrize("name", STUDIES)
def test_every_defence_is_a_method_with_settings_that_it_has(name, script):
    slug = script("study").slug
    defences = STUDIES[name]["defences"]
    assert len({slug(one["name"]) for one in defences}) == len(defences)
    for one in defences:
        words = shlex.split(one["options"])
        given = [after for word, after in pairwise(words) if word == "--set"]
        preset = words[words.index("--preset") + 1] if "--preset" in words else "default"
        assert build(PRESETS[one["method"]][preset], pairs(given)) is not None


@pytest.mark.parametrize("name", [name for name, one in STUDIES.items() if "parts" in one])
def test_every_column_is_an_attack_of_a_battery(name, script):
    study = STUDIES[name]
    assert [own.find(str(BENCHMARKS / "studies" / part["battery"])).recipes for part in study["parts"]]
    assert script("grid").unknown(study) == set()
    study = {**study, "front": {}, "tables": [{"columns": [{"attack": "none"}]}]}
    assert script("grid").unknown(study) == {"none"}


def curve(attack, *scores, fresh="", metric="harm"):
    points = [{"step": step, "per_prompt": {metric: list(row)}} for step, row in scores]
    return {"attack": attack, "fresh": fresh, "points": points}


def test_a_cell_averages_attack_seeds_and_draws_hardening_seeds_and_prompts(script):
    grid = script("grid")
    results = {
        0: [{"curves": [curve("a", (0, [0, 0]), (9, [1, 0])), curve("a", (0, [0, 0]), (9, [1, 1]))]}],
        1: [{"curves": [curve("b", (0, [1, 1]))]}, {"curves": [curve("a", (0, [0, 0]), (9, [0, 0]))]}],
        2: [{"curves": [curve("a", (9, [1, 1]), fresh="artefact")]}],
    }
    assert grid.told(results, grid.Column("a", "harm", None, "")).startswith("0.38 [0.00–")
    assert grid.told(results, grid.Column("a", "harm", 8, "")).startswith("0.00 [0.00–")
    assert grid.told(results, grid.Column("a", "refusal", None, "")) == "–"
    assert grid.told(results, grid.Column("c", "harm", None, "")) == "–"


def test_the_front_is_what_nobody_beats(script):
    points = {
        "a": {"x": 1.0, "y": 0.0},
        "b": {"x": 0.5, "y": 0.5},
        "c": {"x": 0.5, "y": 0.4},
        "d": {"x": 0.5, "y": 0.5},
    }
    assert script("grid").best(points) == {"a", "b", "d"}


def test_a_side_averages_its_columns_and_counts_harm_against(script):
    grid = script("grid")
    results = {0: [{"curves": [curve("a", (9, [1, 0])), curve("b", (9, [1, 1]))]}]}
    columns = [{"attack": name, "metric": "harm", "step": None, "head": ""} for name in "ab"]
    study = {"front": {"held": {"less": True, "columns": columns}, "harmed": {"less": False, "columns": columns}}}
    assert grid.goods(study, results) == {"held": 0.25, "harmed": 0.75}
    columns.append({**columns[0], "attack": "c"})
    assert grid.goods(study, results) is None


def test_a_goal_is_reached_missed_or_open_by_its_interval(script):
    grid = script("grid")
    part = {"columns": [{"attack": name, "metric": "harm", "step": None, "head": ""} for name in "ab"], "most": 0.1}

    def found(a, b):
        return {seed: [{"curves": [curve("a", (9, a)), curve("b", (9, b))]}] for seed in range(4)}

    assert grid.cell(part, found([0] * 96, [0] * 96), {}).startswith("✓ 0.00")
    assert grid.cell(part, found([0] * 96, [1] * 96), {}).startswith("✕ 1.00"), "the worst column counts"
    assert grid.cell(part, found([0] * 8, [0] * 8), {}).startswith("? 0.00"), "eight prompts cannot show it"
    unsure = [1] * 7 + [0] * 89
    assert grid.cell(part, found([0] * 96, unsure), {})[0] == "?", "every column has to be within the limit, surely"
    assert grid.cell(part, {0: [{"curves": [curve("a", (9, [0]))]}]}, {}) == "–"
    least = {"columns": part["columns"], "least": -0.02, "against": "SFT"}
    mine, theirs = found([1] * 96, [0] * 96), found([1] * 96, [1] * 96)
    assert grid.cell(least, mine, theirs).startswith("✕ -1.00")
    assert grid.cell(least, theirs, mine)[0] == "?", "equal on one, better on the other; equal is not sure to 2 points"
    assert grid.cell(least, mine, {0: theirs[0]}) == "–", "other hardening seeds"


def test_a_loss_is_compared_with_a_multiple_of_a_rivals(script):
    grid = script("grid")
    column = {"attack": "a", "metric": "general_loss", "step": 0, "head": ""}
    part = {"columns": [column], "most": 0.0, "against": "SFT", "times": 1.1}

    def found(*losses):
        rows = [[loss + 0.01 * i for i in range(8)] for loss in losses]
        return {seed: [{"curves": [curve("a", (0, row), metric="general_loss")]}] for seed, row in enumerate(rows)}

    rival = found(2.0, 2.01, 2.0)
    assert grid.cell(part, found(2.0, 2.0, 2.01), rival).startswith("✓ -0.20")
    assert grid.cell(part, found(2.5, 2.5, 2.51), rival).startswith("✕ 0.30")
    assert grid.cell(part, found(2.0, 2.1, 2.9), rival)[0] == "?"
    assert grid.told(found(2.0, 2.0, 2.2), grid.Column(**column)).startswith("2.10 [1.8"), "not cut at 1"
