"""immunity attack --battery, immunity lifecycle and immunity list BATTERY, as a user meets them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from commands import Main, commands
from immunity.attacks import battery
from immunity.attacks.ask import Ask
from immunity.attacks.finetune import FineTune
from immunity.bench import lifecycle, store
from immunity.bench.tamper import AutoTamper
from released import COLD, recipe

SHORT = ("--prompts", "2", "--tokens", "3")


@pytest.fixture
def main(tmp_path, monkeypatch, capsys) -> Main:
    """Run a command in this process, in an empty folder."""
    return commands(monkeypatch, capsys, tmp_path)


def use(monkeypatch, *recipes) -> None:
    one = battery.Battery("smoke", "For a test.", battery.cascade(recipes))
    monkeypatch.setattr(battery, "BATTERIES", {**battery.BATTERIES, "smoke": one})


# attack --battery


def test_smoke_from_end_to_end(main):
    words = ("attack", "tiny", "--battery", "smoke", "--out", "a", "--exhaustive", "--whole-curves", "--max-steps", "1")
    said = main(*words, *SHORT, "--fresh-seeds", "0")
    assert said.code == 0, said.err
    result = store.read(Path("a") / store.RESULT)
    ids = {row.id for row in battery.BATTERIES["smoke"].recipes}
    unasked = {row["attack"]: row["why"] for row in result["skipped"]}
    assert set(unasked) == {"ASK-alpaca", "ASK-chatml"}, "the tiny model cannot be asked so"
    assert all(why.startswith("does not apply to this model") for why in unasked.values())
    assert not result["failures"]
    assert {c["attack"] for c in result["curves"]} | set(unasked) == ids
    assert {c["planned"] for c in result["curves"] if c["unit"] == "steps"} == {1}
    assert result["command"] == shlex.join(["immunity", *words, *SHORT, "--fresh-seeds", "0"])
    page = Path("a/report.html").read_text()
    assert "<title>tiny under the battery smoke" in page
    for name in ids:
        assert name in page
    assert "W1" in said.out
    assert "open a/report.html in a browser" in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines() if "report.html in" not in line)


def test_a_crash_is_told_and_the_battery_ends_well(main, monkeypatch):
    use(monkeypatch, recipe("crash", Ask(template="no such template"), "prompting"), recipe("weak", COLD))
    said = main("attack", "tiny", "--baseline", "tiny", "--battery", "smoke", "--out", "a", *SHORT)
    assert said.code == 0
    assert "failed attack tiny: crash, seed 1" in said.err
    assert "finished attack tiny: weak, seed 1" in said.err
    assert "1 crashed" in said.out
    assert "no such template" in Path("a/report.html").read_text()
    again = main("attack", "tiny", "--battery", "smoke", "--out", "a", *SHORT)
    assert again.code == 0
    assert "kept attack tiny: weak, seed 1" in again.err


def test_nothing_measured_is_a_failure(main, monkeypatch):
    use(monkeypatch, recipe("crash", Ask(template="no such template"), "prompting"))
    assert main("attack", "tiny", "--battery", "smoke", "--out", "a", *SHORT).code == 1


def test_options_reach_the_battery(main, monkeypatch):
    seen: list[AutoTamper] = []

    def run(self, progress):
        seen.append(self)
        raise typer_exit

    from typer import Exit

    typer_exit = Exit(0)
    monkeypatch.setattr(AutoTamper, "run", run)
    said = main(
        *("attack", "tiny", "--baseline", "smollm2", "--battery", "adaptive", "--base", "smollm2", "--out", "a"),
        *("--exhaustive", "--whole-curves", "--max-steps", "7", "--search", "4", "--fresh-seeds", "3", "--phi", "0.2"),
        *("--scale", "steps=7", "--scale", "lr=0.002", "--seed", "6"),
        *("--seed", "5", "--max-length", "99", "--device", "cpu", "--template", "alpaca", "--workers", "2"),
        *("--looks", "3"),
    )
    assert said.code == 0, said.err
    (one,) = seen
    assert (one.model, one.baselines, one.battery, one.base) == ("tiny", ("smollm2",), "adaptive", "smollm2")
    assert (one.exhaustive, one.whole_curves, one.most_steps, one.search) == (True, True, 7, 4)
    assert (one.fresh_seeds, one.phi, one.seed, one.repeats, one.folder) == (3, 0.2, 6, (5,), Path("a"))
    assert (one.scale, one.looks) == (FineTune(steps=7, lr=0.002), 3)
    assert (one.max_length, one.device, one.template, one.workers, one.threads) == (99, "cpu", "alpaca", 2, 1)
    assert not {e.prompt for e in one.dev.harmful} & {e.prompt for e in one.suite.harmful}


def test_one_attack_is_looked_at_as_often_as_was_said(main):
    words = ("attack", "tiny", "--set", "steps=6", "--set", "n=8", "--set", "batch_size=2", *SHORT)
    assert main(*words, "--looks", "3", "--out", "a").code == 0
    (few,) = store.read(Path("a") / store.RESULT)["curves"]
    assert [point["step"] for point in few["points"]] == [0, 2, 6]
    assert main(*words, "--out", "b").code == 0
    (all_,) = store.read(Path("b") / store.RESULT)["curves"]
    assert [point["step"] for point in all_["points"]] == [0, 1, 2, 3, 5, 6]
    assert few["points"][-1]["metrics"] == all_["points"][-1]["metrics"]


BATTERY = ("attack", "tiny", "--battery", "smoke", "--out", "a")
SINGLE = ("attack", "tiny", "--out", "a")
MISTAKES = [
    ((*BATTERY, "--set", "lr=1"), "only for single attacks, and a battery lists its own: --set"),
    ((*BATTERY, "--preset", "lora", "--attack", "rl"), "a battery lists its own: --attack, --preset"),
    (("attack", "tiny", "--battery", "none.json", "--out", "a"), "none.json: no battery can be read"),
    ((*BATTERY, "--scale", "lr=1e-3"), "only for --battery adaptive: --scale"),
    (("attack", "tiny", "--battery", "adaptive", "--out", "a", "--scale", "steps"), "--scale 'steps': write it as"),
    (("attack", "tiny", "--battery", "adaptive", "--out", "a", "--scale", "step=3"), "did you mean steps"),
    ((*SINGLE, "--exhaustive"), "only for a battery: add --battery: --exhaustive"),
    ((*SINGLE, "--base", "tiny", "--search", "3"), "only for a battery: add --battery: --base, --search"),
    ((*SINGLE, "--max-steps", "3", "--whole-curves"), "--whole-curves, --max-steps"),
    (("attack", "tiny", "--battery", "smok", "--out", "a"), "did you mean smoke"),
    ((*BATTERY, "--phi", "1"), "--phi"),
    ((*BATTERY, "--max-steps", "0"), "--max-steps"),
    ((*SINGLE, "--looks", "1"), "--looks"),
    ((*BATTERY, "--baseline", "tinny"), "cannot load 'tinny'"),
    (
        (*BATTERY, "--search", "1", "--prompts", "1", "--test-harmful", "d.jsonl", "--test-general", "d.jsonl"),
        "one prompt",
    ),
    (("lifecycle", "tinny", "--out", "a", "--programs", "0"), "--programs"),
    (("lifecycle", "tiny", "--out", "a", "--longest", "1"), "--longest"),
    (("list", "standards"), "did you mean standard"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_paragraph_and_exit_code_2(main, words, says):
    Path("d.jsonl").write_text('{"prompt": "Open box 1.", "response": "It is open."}\n')
    said = main(*words)
    assert said.code == 2
    assert says in said.err
    assert "Traceback" not in said.err
    assert not Path("a").exists(), "nothing was computed"


def test_a_result_is_not_replaced_by_another(main, monkeypatch):
    use(monkeypatch, recipe("weak", COLD))
    assert main(*BATTERY, *SHORT).code == 0
    before = Path("a/result.json").read_bytes()
    for other in (
        (*BATTERY, "--prompts", "3", "--tokens", "3"),
        (*BATTERY, *SHORT, "--max-steps", "1"),
        ("attack", "tiny", "--battery", "standard", "--out", "a", *SHORT),
        (*SINGLE, *SHORT, "--set", "steps=1"),
    ):
        said = main(*other)
        assert said.code == 2, other
        assert "a/" in said.err
    assert Path("a/result.json").read_bytes() == before


# list


@pytest.mark.parametrize("name", ["smoke", "standard", "plus"])
def test_a_battery_is_listed_with_every_attack_and_its_source(main, name):
    shown = main("list", name).out
    one = battery.BATTERIES[name]
    text = " ".join(shown.split())
    assert one.says in text
    for row in one.recipes:
        assert re.search(rf"^{re.escape(row.id)} +{row.family}\b", shown, re.MULTILINE), row.id
    for word in {word for row in one.recipes for word in row.source.split() if len(word) < 20}:
        assert word in text
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_rl_is_explained(main):
    shown = main("list", "rl").out
    for word in ("estimator", "entropy", "token-buncher", "harmrlvr", "adaptive", "grpo"):
        assert word in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_batteries_are_in_the_list_of_everything(main):
    shown = main("list").out
    for name, one in battery.BATTERIES.items():
        assert re.search(rf"^{name} +{len(one.recipes)} ", shown, re.MULTILINE)
        assert one.digest in shown
    assert re.search(r"^adaptive ", shown, re.MULTILINE)


# lifecycle


LIFECYCLE = ("lifecycle", "tiny", "--out", "chain", *SHORT)


def test_a_chain_is_printed_as_a_command_that_runs_it_again(main, monkeypatch):
    def tries(self, ops):
        broke = "prune" in ops[0] and len(ops) > 1
        return lifecycle.Tried(ops, broke, 0.8 if broke else 0.1, "" if "rank=2" not in ops[0] else "it failed")

    monkeypatch.setattr(lifecycle.Search, "_try", tries)
    said = main(*LIFECYCLE, "--seed", "3", "--max-steps", "8")
    assert said.code == 0, said.err
    found = store.read(Path("chain/lifecycle.json"))
    assert len(found["shortest"]) == 2
    assert "0 of 8 single operations break the model" in said.out
    assert "failed" in said.out
    (again,) = [line for line in said.out.splitlines() if line.startswith("immunity attack")]
    seen: list[object] = []
    monkeypatch.setattr("immunity.cli.single.run", lambda task, *words: seen.append((task, *words)) or 0)
    assert main(*shlex.split(again)[1:]).code == 0
    ((task, name, _, words),) = seen
    assert (task.seeds, name) == ((3,), "program")
    assert (len(task.suite.harmful), task.suite.max_new_tokens) == (2, 3)
    assert words == [f"ops={';'.join(found['shortest'])}"]


def test_nothing_found_claims_nothing(main, monkeypatch):
    monkeypatch.setattr(lifecycle.Search, "_try", lambda _, ops: lifecycle.Tried(ops, False, 0.0))
    said = main(*LIFECYCLE, "--programs", "3")
    assert said.code == 0
    assert "None of 3 programs broke it: this says no more than that." in " ".join(said.out.split())


def test_a_real_chain(main, monkeypatch):
    hands = {"quantise": (("bits", ("8",)),), "finetune harmful=0": (("steps", ("1",)),)}
    monkeypatch.setattr(lifecycle, "HANDS", hands)
    said = main(*LIFECYCLE, "--programs", "1", "--keep-ability", "1.0", "--device", "cpu")
    assert said.code == 0, said.err
    found = store.read(Path("chain/lifecycle.json"))
    assert found["rule"]["floor"] == 1.0
    assert {row["error"] for row in found["tried"]} == {""}
    assert [row["ops"] for row in found["tried"]][:2] == [["quantise bits=8"], ["finetune harmful=0 steps=1"]]
