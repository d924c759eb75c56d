"""The studies of benchmarks/: their files say what there is, and their tables average over the right things."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from immunity.attacks import own
from immunity.methods import PRESETS
from immunity.spec import build, pairs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS.parent / "docs" / "results"
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
    lost = {"attack": "none", "metric": "harm", "step": None}
    study = {**study, "front": {}, "goal": [], "tables": [{"columns": [lost]}]}
    assert script("grid").unknown(study) == {"none"}


def curve(attack, *scores, fresh=""):
    points = [{"step": step, "per_prompt": {"harm": list(row)}} for step, row in scores]
    return {"attack": attack, "fresh": fresh, "points": points}


def test_a_cell_averages_attack_seeds_and_draws_hardening_seeds_and_prompts(script):
    grid, Column = script("grid"), script("scores").Column
    end, before = Column("a", "harm", None), Column("a", "harm", 8)
    refused, elsewhere = Column("a", "refusal", None), Column("c", "harm", None)
    parts = {
        0: [{"curves": [curve("a", (0, [0, 0]), (9, [1, 0])), curve("a", (0, [0, 0]), (9, [1, 1]))]}],
        1: [{"curves": [curve("b", (0, [1, 1]))]}, {"curves": [curve("a", (0, [0, 0]), (9, [0, 0]))]}],
        2: [{"curves": [curve("a", (9, [1, 1]), fresh="artefact")]}],
    }
    wanted = [end, before, refused, elsewhere]
    results = {seed: script("scores").scored(found, wanted) for seed, found in parts.items()}
    assert results == {
        0: {"a harm end": [1, 0.5], "a harm 8": [0, 0]},
        1: {"a harm end": [0, 0], "a harm 8": [0, 0]},
        2: {},
    }
    assert grid.told(results, end).startswith("0.38 [0.00–")
    assert grid.told(results, before).startswith("0.00 [0.00–")
    assert grid.told(results, refused) == "–"
    assert grid.told(results, elsewhere) == "–"


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
    results = {0: {"a harm end": [1, 0], "b harm end": [1, 1]}}
    columns = [{"attack": name, "metric": "harm", "step": None, "head": ""} for name in "ab"]
    study = {"front": {"held": {"less": True, "columns": columns}, "harmed": {"less": False, "columns": columns}}}
    assert grid.goods(study, results) == {"held": 0.25, "harmed": 0.75}
    columns.append({**columns[0], "attack": "c"})
    assert grid.goods(study, results) is None


def test_a_goal_is_reached_missed_or_open_by_its_interval(script):
    grid = script("grid")
    part = {"columns": [{"attack": name, "metric": "harm", "step": None, "head": ""} for name in "ab"], "most": 0.1}

    def found(a, b):
        return {seed: {"a harm end": a, "b harm end": b} for seed in range(4)}

    assert grid.cell(part, found([0] * 96, [0] * 96), {}).startswith("✓ 0.00")
    assert grid.cell(part, found([0] * 96, [1] * 96), {}).startswith("✕ 1.00"), "the worst column counts"
    assert grid.cell(part, found([0] * 8, [0] * 8), {}).startswith("? 0.00"), "eight prompts cannot show it"
    unsure = [1] * 7 + [0] * 89
    assert grid.cell(part, found([0] * 96, unsure), {})[0] == "?", "every column has to be within the limit, surely"
    assert grid.cell(part, {0: {"a harm end": [0]}}, {}) == "–"
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
        return {seed: {"a general_loss 0": row} for seed, row in enumerate(rows)}

    rival = found(2.0, 2.01, 2.0)
    assert grid.cell(part, found(2.0, 2.0, 2.01), rival).startswith("✓ -0.20")
    assert grid.cell(part, found(2.5, 2.5, 2.51), rival).startswith("✕ 0.30")
    assert grid.cell(part, found(2.0, 2.1, 2.9), rival)[0] == "?"
    assert grid.told(found(2.0, 2.0, 2.2), script("scores").Column(**column)).startswith("2.10 [1.8"), "not cut at 1"


def small(**changed):
    """A study of one defence and one attack."""
    column = {"attack": "full", "metric": "useful_harm", "step": None}
    return {
        **{"model": "tiny", "align": "", "common": "", "seeds": [0, 1], "attack_seeds": [1], "prompts": 2, "looks": 2},
        "title": "One trap",
        "says": "It is small.",
        "parts": [{"name": "core", "battery": "traps-core.json"}],
        "defences": [
            {"name": "one", "method": "sft", "options": "--steps 1"},
            {"name": "two", "method": "sft", "options": "--steps 2", "after": "one"},
        ],
        "front": {"held": {"says": "harm", "less": True, "columns": [column]}},
        "tables": [{"title": "Harm", "says": "Shares.", "columns": [{**column, "head": "end"}]}],
        **changed,
    }


def test_kept_scores_stand_in_for_models_that_are_elsewhere(script, tmp_path, monkeypatch, capsys):
    grid, scores = script("grid"), script("scores")
    path, kept, done = tmp_path / "study.json", tmp_path / "scores.jsonl", tmp_path / "out"
    path.write_text(json.dumps(small()), encoding="utf-8")
    for seed, row in enumerate(([1, 0], [1, 1])):
        place = done / f"seed{seed}" / "one" / "attacked-core"
        place.mkdir(parents=True)
        points = [{"step": 9, "per_prompt": {"useful_harm": row}}]
        result = {"curves": [{"attack": "full", "fresh": "", "points": points}]}
        (place / "result.json").write_text(json.dumps(result), encoding="utf-8")

    def table(out):
        words = ["grid.py", str(path), "--out", str(out), "--scores", str(kept), "--table", str(tmp_path / "t.md")]
        monkeypatch.setattr("sys.argv", words)
        grid.main()
        return [
            line for line in (tmp_path / "t.md").read_text(encoding="utf-8").splitlines() if line.startswith("| one")
        ]

    first = table(done)
    assert first[-1].startswith("| one (2) | 0.75 [")
    assert table(tmp_path / "nothing") == first
    ran = []
    monkeypatch.setattr(
        grid, "hardened", lambda _, defence, seed, out: ran.append((defence["name"], seed)) or out / "m"
    )
    monkeypatch.setattr(grid, "attack", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["grid.py", str(path), "--out", str(done), "--scores", str(kept)])
    grid.main()
    assert ran == [("two", 0), ("two", 1)], "those that the file keeps are done"
    kept.write_text(kept.read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"scores\.jsonl, line 3: not the scores"):
        scores.Kept(kept)


def test_scores_of_an_edited_study_are_not_taken(script):
    scores = script("scores")
    study = small()
    one, two = study["defences"]
    known = scores.digest(study, one)
    assert known == scores.digest(small(seeds=[3], title="other", front={}), one), "what is shown does not matter"
    for changed in (
        small(attack_seeds=[2]),
        small(prompts=3),
        small(align="--steps 2"),
        small(common="--batch-size 2"),
    ):
        assert scores.digest(changed, one) != known
    assert scores.digest(study, {**one, "options": "--steps 3"}) != known
    before = {**study, "defences": [{**one, "options": "--steps 3"}, two]}
    assert scores.digest(before, two) != scores.digest(study, two), "what it started from"
    kept = scores.Kept(None)
    kept.add(study, one, 0, {"full harm end": [1.0]})
    assert kept.find(study, one, 0) == {"full harm end": [1.0]}
    assert kept.find(small(prompts=3), one, 0) is None
    assert kept.find(study, one, 1) is None


def test_the_picture_has_a_cell_for_each_defence_and_rate(script):
    grid = script("grid")
    rate, nats = (
        {"attack": "full", "metric": metric, "step": 0, "head": metric} for metric in ("harm", "general_loss")
    )
    drawn = {"line": 0, "title": "before", "scheme": "reds"}
    tables = [{"drawn": drawn, "columns": [nats, rate]}, {"columns": [rate]}, {"drawn": drawn, "columns": [rate]}]
    found = {"one": {0: {"full harm 0": [1, 0]}, 1: {"full harm 0": [0, 0]}}, "two": {}}
    (line,) = grid.figure(small(tables=tables), found)["vconcat"]
    first, second = line["hconcat"]
    assert first["data"]["values"] == [{"defence": "one", "place": 0, "value": 0.25}], "no losses, nobody unmeasured"
    assert first["encoding"]["x"]["axis"]["labelExpr"] == '["harm"][datum.value]'
    assert (first["encoding"]["y"]["axis"], second["encoding"]["y"]["axis"]) == ({"labelLimit": 320}, None)


@pytest.mark.parametrize("name", [path.stem for path in RESULTS.glob("*.jsonl")])
def test_a_published_table_is_what_the_published_scores_give(name, script, tmp_path, monkeypatch):
    grid, kept, drawn = script("grid"), tmp_path / "scores.jsonl", tmp_path / "table.md"
    kept.write_bytes((RESULTS / f"{name}.jsonl").read_bytes())
    study = str(BENCHMARKS / "studies" / f"{name}.json")
    words = ["grid.py", study, "--out", str(tmp_path / "nothing"), "--scores", str(kept), "--table", str(drawn)]
    monkeypatch.setattr("sys.argv", words)
    grid.main()
    ours, theirs = (path.read_text(encoding="utf-8").split("\n## ", 1)[1] for path in (drawn, RESULTS / f"{name}.md"))
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", ours) == number.sub("#", theirs)
    numbers = [[float(one) for one in number.findall(text)] for text in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.011), "a hundredth for another machine's rounding"
