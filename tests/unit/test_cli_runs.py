"""Runs that are interrupted or killed, as real processes: the same command goes on, and the result is the same."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from immunity import cli
from immunity.bench import keeping, store

ROWS = [{"prompt": f"Open box {i}.", "response": f"Box {i} is open."} for i in range(8)]
DEADLINE = 300.0
"""Only a run that hangs takes so long, however busy the machine is."""
STEPS = 30
IMMUNISE = (
    *("immunise", "tiny", "--harmful", "d.jsonl", "--general", "d.jsonl", "--alignment", "d.jsonl", "--lr", "1e-3"),
    *("--save-every", "3", "--steps", str(STEPS)),
)
ATTACK = (
    *("attack", "tiny", "--harmful", "d.jsonl", "--test-harmful", "d.jsonl", "--test-general", "d.jsonl"),
    *("--judge", "none", "--set", "n=8", "--set", "steps=60", "--prompts", "3", "--tokens", "3", "--max-length", "32"),
    *("--seed", "1", "--seed", "2"),
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture
def main(here, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run a command in this process: (exit code, stderr)."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["immunity", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from immunity.cli import main; main()", *words]


HOLD = """
import os, pathlib, time

rename = pathlib.Path.rename

def held(self, target):
    found = rename(self, target)
    if pathlib.Path(target).name == os.environ["HELD_AT"]:
        pathlib.Path(f"held-{os.environ['HELD_AT']}-{os.getpid()}").touch()
        while True:
            time.sleep(0.01)
    return found

pathlib.Path.rename = held
"""
"""What every process of a command does first: it goes no further than a checkpoint, so that no machine is too fast."""


def stopped(
    here: Path, at: int, how: signal.Signals, *words: str, processes: int = 1, meanwhile: Callable[[], object] = int
) -> tuple[int, str, list[int]]:
    """Start a command, and stop it when so many of its processes have written the checkpoint after step ``at``.

    Returns:
        The exit code, stderr, and the command's children at that moment.
    """
    place, checkpoint = here / "hold" / "sitecustomize.py", f"checkpoint-{at:08d}"
    place.parent.mkdir(exist_ok=True)
    place.write_text(HOLD)
    paths = os.pathsep.join([str(place.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command(*words),
        cwd=here,
        env={**os.environ, "PYTHONPATH": paths, "HELD_AT": checkpoint},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE
    while len(list(here.glob(f"held-{checkpoint}-*"))) < processes and process.poll() is None:
        assert time.monotonic() < deadline, f"no {checkpoint} within {DEADLINE:g} seconds"
        time.sleep(0.01)
    meanwhile()
    children = offspring(process.pid)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # a terminal's Ctrl-C goes to the whole group
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=DEADLINE)
    return process.returncode, err, children


def offspring(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() and not _zombie(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def rows_in(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_immunise_killed_and_terminated_ends_with_the_same_weights(here, main, monkeypatch):
    monkeypatch.setattr(keeping, "time", SimpleNamespace(perf_counter=count().__next__))  # a second passes at each look
    log = here / "a b" / "metrics.jsonl"
    words = [*IMMUNISE, "--out", "a b"]
    code, err, _ = stopped(here, 3, signal.SIGKILL, *words)
    assert code == -signal.SIGKILL, err
    second: list[tuple[int, str]] = []
    code, err, _ = stopped(  # the first one still runs when the second is refused
        here, 9, signal.SIGTERM, *words, meanwhile=lambda: second.append(main(*words))
    )
    assert code == 143, err
    assert "Traceback" not in err
    assert second[0][0] == 2
    assert "another process is writing to a b" in second[0][1]
    assert not (here / "a b" / "model").exists()
    again = shlex.join(["immunity", *words])
    assert again in err
    code, err = main(*shlex.split(again)[1:])
    assert code == 0, err
    assert "goes on" in err
    assert main(*IMMUNISE, "--out", "once")[0] == 0
    a, b = (load_file(here / name / "model" / "model.safetensors") for name in ("a b", "once"))
    assert all(torch.equal(a[name], b[name]) for name in {*a, *b})
    assert rows_in(log) == STEPS
    broken, once = (store.read(here / name / store.RECORD) for name in ("a b", "once"))
    assert broken["log"] == once["log"]
    assert broken["seconds_per_step"] == once["seconds_per_step"] == 1, "not divided by steps it did not make"
    assert not list((here / "a b").glob("checkpoint*"))


def curves(folder: Path) -> list[dict[str, object]]:
    found = store.read(folder / store.RESULT)["curves"]
    for curve in found:
        for point in curve["points"]:
            del point["seconds"]
    return list(found)


def test_attack_with_workers_goes_on_to_the_same_curves_and_leaves_no_worker(here, main):
    words = [*ATTACK, "--workers", "2", "--out", "x"]
    code, err, workers = stopped(here, 40, signal.SIGINT, *words, processes=2)
    assert code == 130, err
    assert len(workers) >= 2
    assert gone(workers)
    assert "Traceback" not in err
    assert "resource_tracker" not in err
    assert shlex.join(["immunity", *words]) in err
    code, err = main(*ATTACK, "--out", "x")
    assert code == 0, err
    assert err.count("from step 40") == 2, err
    assert main(*ATTACK[:-4], "--seed", "1", "--out", "once")[0] == 0
    assert curves(here / "x")[:1] == curves(here / "once")


def test_workers_end_when_their_parent_is_killed(here):
    words = [*ATTACK, "--workers", "2", "--out", "x"]
    code, _, workers = stopped(here, 20, signal.SIGKILL, *words, processes=2)
    assert code == -signal.SIGKILL
    assert len(workers) >= 2
    assert gone(workers)
