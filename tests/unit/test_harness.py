"""lm-eval: what can be said without it, and with it (`make test-eval`) its tasks asked of the tiny model."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from immunity import load
from immunity.batch import IGNORE, Batch, Tokens
from immunity.bench import store
from immunity.cli import program
from immunity.data import synthetic
from immunity.data.corpus import Example
from immunity.errors import DataError, MissingExtraError, SettingsError
from immunity.generate import generate
from immunity.losses import nll
from immunity.measure import harness
from immunity.measure.accuracy import accuracy
from immunity.measure.reader import Reader
from immunity.metrics.stability import stability
from immunity.models import LanguageModel

N = 60
MOODS = ("The mood is negative.", "The mood is positive.")
CHOICE = """
task: picks
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("tiny")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)


def examples(kind: str) -> tuple[Example, ...]:
    """What the tiny model knows, and for a third what it does not: moods to pick from, or facts of the real world."""
    known = synthetic.corpus("general", "general", "test").examples
    moods, common = synthetic.corpus("sentiment", "benign", "test"), synthetic.corpus("common", "general", "test")
    return known[: N - N // 3] + (moods if kind == "picks" else common).examples[: N // 3]


def choices(i: int) -> tuple[str, str]:
    """The right answer, first or second in turn, and a wrong one: the other mood, or the answer to another question."""
    every = examples("picks")
    right, next_ = every[i].response, every[(i + 1) % (N - N // 3)].response
    wrong = MOODS[1 - MOODS.index(right)] if right in MOODS else next_
    return (right, wrong) if i % 2 else (wrong, right)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of two tasks on the harmless stand-ins; what the data library keeps of them goes away with it."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "tasks"
    place.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {
        "picks": [
            {"prompt": e.prompt, "choices": choices(i), "gold": 1 - i % 2} for i, e in enumerate(examples("picks"))
        ],
        "facts": [{"prompt": e.prompt, "answer": e.response} for e in examples("facts")],
    }
    for name, form in (("picks", CHOICE), ("facts", ANSWER)):
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        (place / f"{name}.yaml").write_text(form.format(data=data), encoding="utf-8")
    (place / "both.yaml").write_text(
        "group: both\ntask: [picks, facts]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n",
        encoding="utf-8",
    )
    yield place


@pytest.mark.usefixtures("without")
def test_without_the_package_the_extra_is_named(model: LanguageModel) -> None:
    with pytest.raises(MissingExtraError, match=r"immunity\[eval\]"):
        harness.known(["arc_easy"])
    with pytest.raises(MissingExtraError, match=r"immunity\[eval\]"):
        harness.rows(model, ["arc_easy"])


@pytest.mark.usefixtures("without")
def test_the_command_says_so_before_it_opens_a_model(tmp_path: Path) -> None:
    said = CliRunner().invoke(
        program(), ["benchmark", "no such model", "--tasks", "arc_easy", "--out", str(tmp_path / "out")]
    )
    assert isinstance(said.exception, MissingExtraError)
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_off_the_results_of_others(tmp_path: Path) -> None:
    store.write(tmp_path / store.RESULT, {"schema": 1, "curves": []})
    said = CliRunner().invoke(program(), ["benchmark", "tiny", "--tasks", "x", "--out", str(tmp_path)])
    assert "result of another command" in str(said.exception)


def test_multiple_choice_is_right_where_the_right_answer_is_likelier(model: LanguageModel, folder: Path) -> None:
    found = harness.rows(model, ["picks"], folder=folder)[0]
    ours = [float(likelier(model, e.prompt, choices(i)) == e.response) for i, e in enumerate(examples("picks"))]
    assert (found["n"], found["task"], found["metric"]) == (N, "picks", "acc")
    assert found["per_item"] == ours
    assert 0.5 < found["value"] < 1.0


def likelier(model: LanguageModel, prompt: str, answers: tuple[str, str]) -> str:
    """The answer with the smaller loss in all, by the losses that training descends; the end of the turn left out."""
    rows = []
    for answer in answers:
        example = Example(prompt=prompt, response=answer)
        before, after = model.template.prompt_ids(example), model.template.answer_ids(example)[:-1]
        rows.append(Tokens((*before, *after), (*(IGNORE,) * len(before), *after)))
    losses = nll(model.network, Batch(tuple(rows))).tolist()
    totals = [loss * row.n_response for loss, row in zip(losses, rows, strict=True)]
    return answers[totals.index(min(totals))]


def test_accuracy_by_lm_eval_is_accuracy_by_our_scorer(model: LanguageModel, folder: Path) -> None:
    found = harness.rows(model, ["facts"], folder=folder)[0]
    ours = accuracy(examples("facts"), generate(model, examples("facts"), max_new_tokens=24))
    assert found["per_item"] == list(ours.known)
    assert found["value"] == pytest.approx(ours.mean)
    assert 0.2 < found["value"] < 0.9, "a task on which the model is always right or wrong would show nothing"


def test_raw_it_is_what_lm_evals_own_model_says(model: LanguageModel, folder: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=8)
    found = []
    for asked in (theirs, harness._model(Reader(model, chat=False))):
        manager = harness._manager(["picks", "facts"], folder)
        loaded = harness._loaded(manager, ["picks", "facts"], shots=0, seed=0, chat=False)
        found.append(evaluate(asked, loaded, limit=20, bootstrap_iters=0)["samples"])
    for mine, other in zip(found[1]["picks"], found[0]["picks"], strict=True):
        assert mine["arguments"] == other["arguments"]
        for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert a[0] == pytest.approx(b[0], abs=1e-3)
            assert a[1] == b[1]
    texts = [[sample["resps"][0][0].strip() for sample in one["facts"]] for one in found]
    assert texts[0] == texts[1]


def test_few_examples_are_shown_in_the_one_turn(model: LanguageModel, folder: Path, monkeypatch: Any) -> None:
    seen: list[str] = []

    def answers(self: Reader, prompts: list[str], **_: object) -> list[str]:
        seen.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(Reader, "answers", answers)
    harness.rows(model, ["facts"], folder=folder, shots=2, limit=3)
    assert len(seen) == 3
    first = examples("facts")[0]
    assert all(prompt.count("\n\n") == 2 for prompt in seen)
    assert seen[0].endswith(first.prompt)
    assert not any("<|" in prompt for prompt in seen), "the template's tokens are written by the template"


def test_the_same_seed_gives_the_same_and_leaves_no_trace(model: LanguageModel, folder: Path) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first = harness.rows(model, ["facts"], folder=folder, shots=1, limit=8, seed=3)
    assert harness.rows(model, ["facts"], folder=folder, shots=1, limit=8, seed=3, batch_size=3) == first
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_a_group_is_one_row_over_all_its_questions(model: LanguageModel, folder: Path) -> None:
    (folder / "facts.yaml").unlink()
    (folder / "picks2.yaml").write_text((folder / "picks.yaml").read_text().replace("task: picks", "task: picks2"))
    (folder / "both.yaml").write_text("group: both\ntask: [picks, picks2]\n")
    rows = harness.rows(model, ["both"], folder=folder, limit=10)
    assert [(r["task"], r["group"], r["n"]) for r in rows] == [
        ("both", "", 20),
        ("picks", "both", 10),
        ("picks2", "both", 10),
    ]
    assert rows[0]["per_item"] == rows[1]["per_item"] * 2


def test_stability_takes_comparison_rows(model: LanguageModel, folder: Path) -> None:
    rows = harness.comparison_rows(model, model, ["picks", "facts"], folder=folder)
    assert [row["task"] for row in rows] == ["picks (acc)", "facts (exact_match)"]
    claims = {c.name: c for c in stability(rows).claims}
    assert claims["accuracy on picks (acc)"].value == 0.0
    assert claims["accuracy on all 2 tasks"].n == 2 * N


def test_unknown_tasks_and_folders_are_named_with_what_is_near(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"no task, group or tag is called 'mods'; did you mean .*picks"):
        harness.known(["mods"], folder)
    with pytest.raises(SettingsError, match="no such folder of tasks"):
        harness.known(["picks"], folder / "nowhere")
    with pytest.raises(SettingsError, match="no task is named"):
        harness.known([], folder)
    harness.known(["picks", "arc_easy", "both"], folder)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("unsafe_code: true", "runs code that the model wrote"),
        ('gen_prefix: "It is"', "begins the answer itself"),
        ("generation_kwargs: {do_sample: true, temperature: 0.7}", "wants sampled answers"),
    ],
)
def test_what_is_not_done_here_is_refused(model: LanguageModel, folder: Path, line: str, why: str) -> None:
    text = (folder / "facts.yaml").read_text()
    kept = [old for old in text.splitlines() if not old.startswith(line.split(":", maxsplit=1)[0])]
    (folder / "facts.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(SettingsError, match=why):
        harness.rows(model, ["facts"], folder=folder)


def test_data_that_are_not_there_are_said_to_be_missing(model: LanguageModel, folder: Path) -> None:
    (folder / "facts.jsonl").unlink()
    with pytest.raises(DataError, match=r"facts: lm-eval cannot read it .*facts.jsonl"):
        harness.rows(model, ["facts"], folder=folder)
    with pytest.raises(SettingsError, match="at least one question"):
        harness.rows(model, ["picks"], folder=folder, limit=0)


def test_the_command_compares_and_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*more: str) -> Any:
        words = ["--tasks-folder", str(folder), "--limit", "40", "--out", str(tmp_path / "out"), *more]
        return CliRunner().invoke(program(), ["benchmark", "tiny", "--baseline", "tiny", *words])

    said = run("--tasks", "picks")
    assert said.exit_code == 0, said.output
    asked: list[str] = []
    real = harness.rows

    def counted(model: LanguageModel, tasks: list[str], **how: Any) -> list[dict[str, Any]]:
        asked.extend(tasks)
        return real(model, tasks, **how)

    monkeypatch.setattr(harness, "rows", counted)
    said = run("--tasks", "picks,facts")
    assert said.exit_code == 0, said.output
    assert asked == ["facts", "facts"]
    found = store.read(tmp_path / "out" / store.RESULT)
    assert [row["task"] for row in found["compared"]] == ["picks", "facts", "all 2 tasks"]
    assert {row["difference"] for row in found["compared"]} == {0.0}
    assert "Not enough evidence: accuracy on picks (acc)" in " ".join(said.output.split())
    said = CliRunner().invoke(program(), ["report", str(tmp_path / "out")])
    assert isinstance(said.exception, DataError)
    said = run("--tasks", "mods")
    assert isinstance(said.exception, SettingsError)
    with (folder / "facts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Name a colour.", "answer": "Red."}) + "\n")
    said = run("--tasks", "facts")
    assert said.exit_code == 2
    assert "other settings: asking.tasks_folder" in " ".join(said.output.split())
