"""immunity probe, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Main, commands
from immunity.bench.geometry import Geometry

FEW = ("--draws", "1", "--rows", "4", "--prompts", "4", "--distance", "0.3", "--distance", "0.1", "--path-steps", "2")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Main:
    """Run a command in this process, in the folder of the probe."""
    return commands(monkeypatch, capsys, folder, columns=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


def test_it_looks_tells_writes_and_keeps(main: Main, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = main("probe", "tiny", "--out", "shape", "--device", "cpu", *FEW)
    assert said.code == 0, said.err
    for word in (
        "Down the harmful gradient",
        "Random directions",
        "A path of benign steps",
        "A diagnostic, and no claim",
    ):
        assert word in said.out
    assert "finished probe tiny" in said.err
    assert "goes on" not in said.err
    found: dict[str, Any] = json.loads((folder / "shape" / "result.json").read_text(encoding="utf-8"))
    assert found["kind"] == "geometry"
    assert found["geometry"]["word"] == "error"
    (model,) = found["geometry"]["models"]
    assert {curve["direction"] for curve in model["curves"]} == {
        "harmful", "benign", "harmful-adam", "benign-adam", "random", "harmful-path", "benign-path",
    }  # fmt: skip
    assert [point["distance"] for point in model["curves"][0]["points"]] == [0.0, 0.1, 0.3]
    assert model["summary"]["numbers"]["curvature"]["harmful"]["n"] == 1
    page = (folder / "shape" / "report.html").read_text(encoding="utf-8")
    assert "<h1" in page
    assert "Trap geometry" in page

    monkeypatch.setattr(Geometry, "work", lambda *_: pytest.fail("it is done already"))
    again = main("probe", "tiny", "--out", "shape", "--device", "cpu", *FEW)
    assert again.code == 0
    assert "kept probe tiny" in again.err
    assert json.loads((folder / "shape" / "result.json").read_text(encoding="utf-8")) == found
    (folder / "shape" / "report.html").unlink()
    assert main("report", "shape").code == 0
    assert (folder / "shape" / "report.html").read_text(encoding="utf-8") == page


def test_other_settings_want_another_folder(main: Main) -> None:
    said = main("probe", "tiny", "--out", "shape", "--device", "cpu", *FEW, "--seed", "1")
    assert said.code == 2
    assert "other settings" in said.err
    assert "--out" in said.err


def test_it_does_not_replace_another_commands_result(main: Main, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "result.json").write_text('{"kind": "benchmark"}', encoding="utf-8")
    said = main("probe", "tiny", "--out", "other")
    assert said.code == 2
    assert "another command" in said.err


def rows(path: Path, name: str) -> str:
    lines = [json.dumps({"prompt": f"{name} question {i}?", "response": f"{name} answer {i}."}) for i in range(6)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_data_of_ones_own(main: Main, folder: Path) -> None:
    harmful, held, chat = (rows(folder / f"{name}.jsonl", name) for name in ("restricted", "held", "chat"))
    words = ("--harmful", harmful, "--test-harmful", held, "--test-general", chat)
    said = main("probe", "tiny", "--out", "own", "--device", "cpu", *FEW, *words)
    assert said.code == 0, said.err
    (model,) = json.loads((folder / "own" / "result.json").read_text(encoding="utf-8"))["geometry"]["models"]
    assert {curve["direction"] for curve in model["curves"]} == {"harmful", "harmful-adam", "random", "harmful-path"}
    assert set(model["summary"]["home"]) == {"collapse", "harmful", "general"}
    assert model["draws"][0]["cosines"] == {}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--harmful", "restricted.jsonl"), "--test-harmful"),
        (("--test-harmful", "held.jsonl", "--test-general", "chat.jsonl"), "--harmful"),
        (("--distance", "0"), "--distance"),
        (("--draws", "0"), "--draws"),
        (("--word", " "), "no ordinary token"),
    ],
)
def test_what_it_cannot_do_it_refuses(main: Main, folder: Path, words: tuple[str, ...], why: str) -> None:
    for name in ("restricted", "held", "chat"):
        rows(folder / f"{name}.jsonl", name)
    said = main("probe", "tiny", "--out", "no", "--device", "cpu", *words)
    assert said.code == 2
    assert why in said.err
    assert not (folder / "no" / "result.json").exists()
