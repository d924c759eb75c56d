"""Inspect: what can be said without it, and with it (`make test-eval`) its tasks asked of the tiny model."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from immunity import load
from immunity.bench import store
from immunity.bench.benchmarking import Asking
from immunity.cli import program
from immunity.data import synthetic
from immunity.data.corpus import Example
from immunity.errors import DataError, MissingExtraError, ModelError, SettingsError
from immunity.generate import generate
from immunity.measure import inspection
from immunity.measure.accuracy import accuracy
from immunity.metrics.stability import stability
from immunity.models import LanguageModel

N = 40
TASKS = """
import json
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact
from inspect_ai.solver import generate, system_message, user_message

with open({data!r}) as file:
    ROWS = [Sample(id=i, input=row["prompt"], target=row["answer"]) for i, row in enumerate(map(json.loads, file), 1)]

@task
def facts():
    return Task(dataset=ROWS, solver=generate(), scorer=exact(), config=GenerateConfig(max_tokens=24))

@task
def twice():
    return Task(dataset=ROWS, solver=[generate(), user_message("And then?"), generate()], scorer=exact())

@task
def drawn():
    return Task(dataset=ROWS, solver=generate(), scorer=exact(), config=GenerateConfig(temperature=0.7))

@task
def ruled():
    return Task(dataset=ROWS, solver=[system_message("Be brief."), generate()], scorer=exact())

@task
def broken():
    raise KeyError("no such column")
"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("tiny")


def examples() -> tuple[Example, ...]:
    """What the tiny model knows, and what it does not."""
    known, unknown = (synthetic.corpus(name, "general", "test").examples for name in ("general", "common"))
    return known[: N - N // 4] + unknown[: N // 4]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("inspect_ai")
    place = tmp_path / "tasks"
    place.mkdir()
    data = place / "facts.jsonl"
    rows = ({"prompt": e.prompt, "answer": e.response} for e in examples())
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "facts.py").write_text(TASKS.format(data=str(data)), encoding="utf-8")
    return place


def test_without_the_package_the_extra_is_named(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(MissingExtraError, match=r"immunity\[inspect\]"):
        inspection.known(["facts"])
    with pytest.raises(MissingExtraError, match=r"immunity\[inspect\]"):
        inspection.rows(model, ["facts"])


def test_what_inspect_decides_by_itself_is_not_asked_for() -> None:
    with pytest.raises(SettingsError, match="Inspect's tasks say themselves"):
        Asking(by="inspect", shots=2)
    with pytest.raises(SettingsError, match="Inspect's tasks say themselves"):
        Asking(by="inspect", chat=False)


def test_questions_that_come_one_by_one_are_answered_together() -> None:
    asked: list[tuple[int, list[str]]] = []

    def answers(prompts: list[str], tokens: int, stops: tuple[str, ...]) -> list[str]:
        asked.append((tokens, prompts))
        if tokens == 9:
            raise ModelError("too long")
        return [prompt.upper() for prompt in prompts]

    async def come() -> list[object]:
        desk = inspection._Desk(answers)
        pairs = [("a", 8), ("b", 8), ("c", 9), ("d", 8), ("e", 9)]
        return await asyncio.gather(*(desk.ask(p, n, ()) for p, n in pairs), return_exceptions=True)

    pytest.importorskip("anyio")
    found = asyncio.run(come())
    assert asked == [(8, ["a", "b", "d"]), (9, ["c", "e"])]
    assert [found[i] for i in (0, 1, 3)] == ["A", "B", "D"]
    assert all(isinstance(found[i], ModelError) for i in (2, 4))


def test_accuracy_by_inspect_is_accuracy_by_our_scorer(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    listen = socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", lambda self, *a: (opened.append(self), listen(self, *a))[1])
    before = list(logging.getLogger().handlers), logging.getLogger().level
    found = inspection.rows(model, ["facts"], folder=folder)[0]
    ours = accuracy(examples(), generate(model, examples(), max_new_tokens=24))
    assert found["per_item"] == list(ours.known)
    assert (found["task"], found["n"], found["share"]) == ("facts", N, True)
    assert found["value"] == pytest.approx(ours.mean)
    assert 0.2 < found["value"] < 0.9, "a task on which the model is always right or wrong would show nothing"
    assert opened == [], "no server is started"
    assert before == (list(logging.getLogger().handlers), logging.getLogger().level)


def test_the_system_turn_stands_before_the_users(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def answers(self: object, prompts: list[str], **_: object) -> list[str]:
        seen.extend(prompts)
        return ["yes"] * len(prompts)

    monkeypatch.setattr(inspection.Reader, "answers", answers)
    found = inspection.rows(model, ["ruled"], folder=folder, limit=3)[0]
    assert found["value"] == 0.0
    assert len(seen) == 3
    assert all(prompt.startswith("Be brief.\n\n") for prompt in seen)


def test_stability_takes_comparison_rows(model: LanguageModel, folder: Path) -> None:
    rows = inspection.comparison_rows(model, model, ["facts"], folder=folder, limit=30)
    claim = stability(rows).claims[0]
    assert (claim.n, claim.value) == (30, 0.0)


def test_what_cannot_be_asked_is_said(model: LanguageModel, folder: Path) -> None:
    for name, why in (
        ("twice", "is a conversation of several turns"),
        ("drawn", "wants sampled answers"),
        ("broken", "no such column"),
    ):
        with pytest.raises(DataError, match=why):
            inspection.rows(model, [name], folder=folder, limit=2)


def test_unknown_tasks_are_named_with_what_is_near(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"no task is called 'fact'; did you mean facts\?"):
        inspection.known(["fact"], folder)
    with pytest.raises(SettingsError, match="which is not installed"):
        inspection.known(["no_such_package/quiz"], folder)
    with pytest.raises(SettingsError, match="name a folder of tasks, or PACKAGE/NAME"):
        inspection.known(["quiz"])
    with pytest.raises(SettingsError, match="no such folder"):
        inspection.known(["facts"], folder / "nowhere")


def test_the_command_writes_its_result_and_inspects_own_logs(folder: Path, tmp_path: Path) -> None:
    words = ["--with", "inspect", "--tasks-folder", str(folder), "--limit", "10", "--out", str(tmp_path / "out")]
    said: Any = CliRunner().invoke(program(), ["benchmark", "tiny", "--tasks", "facts,twice", *words])
    assert said.exit_code == 2, said.output
    assert "several turns" in " ".join(said.output.split())
    found = store.read(tmp_path / "out" / store.RESULT)
    assert [row["task"] for row in found["rows"]["model"]] == ["facts"]
    assert found["compared"] == []
    assert list((tmp_path / "out" / "model" / "facts" / "inspect").glob("*.eval"))
