"""The pool: what happens to one job never harms another, and no process is left behind."""

from __future__ import annotations

import logging
import signal
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from immunity.bench import pool, worker

JOBS = """
import logging, os, signal, warnings
from dataclasses import dataclass
from immunity.errors import DivergedError, ModelError

class Stop(Exception): pass

@dataclass
class Toy:
    what: str
    steps: int = 3
    measured_at = frozenset()
    title = "toy"

    def kept(self):
        if self.what == "foreign":
            raise ModelError("another run")
        return {"what": self.what} if self.what == "kept" else None

    def __call__(self, tell):
        for done in range(self.steps + 1):
            tell(done, {"x/y": done} if done else {})
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "fault":
            raise Stop("a fault of the program")
        if self.what == "refused":
            raise ModelError("no such model")
        if self.what == "diverged":
            raise DivergedError("step 3: nan")
        if self.what == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB\\nmore")
        if self.what == "torch":
            raise RuntimeError("shapes differ")
        if self.what == "disk":
            raise OSError(28, "No space left on device")
        if self.what == "warns":
            logging.getLogger("immunity.toy").warning("mind %s", "this")
        return {"what": self.what, "threads": __import__("torch").get_num_threads()}
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A module that spawned processes find, too."""
    (tmp_path / "toy_jobs.py").write_text(textwrap.dedent(JOBS))
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    return importlib.import_module("toy_jobs")


class Seen:
    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []

    def began(self, index: int) -> None:
        self.said.append(("began", index, 0))

    def __call__(self, index: int, done: int, trace: Mapping[str, float]) -> None:
        self.said.append(("step", index, done))

    def ended(self, outcome: worker.Outcome, index: int) -> None:
        self.said.append(("ended", index, int(outcome.record is not None)))


def of(seen: Seen, index: int) -> list[tuple[str, int]]:
    return [(what, number) for what, i, number in seen.said if i == index]


WHOLE = [("began", 0), ("step", 0), ("step", 1), ("step", 2), ("step", 3), ("ended", 1)]


def test_side_by_side_a_dead_worker_costs_its_own_job_only(toys, caplog, capfd):
    kinds = ["killed", "fine", "refused", "warns", "fault"]
    seen = Seen()
    with caplog.at_level(logging.WARNING):
        outcomes = pool.run([toys.Toy(kind) for kind in kinds], workers=2, threads=1, progress=seen)
    assert [o.job.what for o in outcomes] == kinds
    assert [o.record is not None for o in outcomes] == [False, True, False, True, False]
    assert "SIGKILL" in outcomes[0].error
    assert "not enough memory" in outcomes[0].error
    assert "exit code 1" in outcomes[4].error
    assert "a fault of the program" in capfd.readouterr().err, "a fault keeps its traceback"
    assert outcomes[2].refused
    assert of(seen, 1) == WHOLE
    assert of(seen, 0)[-1] == ("ended", 0)
    assert "mind this" in caplog.text
    assert not pool.multiprocessing.active_children()


def test_processes_can_be_kept_for_the_next_run(toys):
    def pids():
        return {child.pid for child in pool.multiprocessing.active_children()}

    def twice(kind):
        outcomes = pool.run([toys.Toy(kind), toys.Toy("fine")], workers=2, threads=1, progress=Seen())
        return [outcome.record is not None for outcome in outcomes]

    with pool.kept():
        assert twice("fine") == [True, True]
        first = pids()
        assert len(first) == 2
        with pool.kept():
            assert twice("fine") == [True, True]
        assert pids() == first, "the same ones, also within another one"
        assert twice("killed") == [False, True]
        assert len(pids() & first) == 1, "a dead one is not kept"
        assert twice("fine") == [True, True]
    assert not pids()
    with pytest.raises(KeyError), pool.kept():
        twice("fine")
        raise KeyError
    assert not pids(), "whatever happens"


def test_what_is_done_needs_no_process(toys, monkeypatch):
    monkeypatch.setattr(pool, "_Worker", None)
    seen = Seen()
    kept, foreign = pool.run([toys.Toy("kept"), toys.Toy("foreign")], workers=2, threads=1, progress=seen)
    assert kept.record == {"what": "kept"}
    assert foreign.refused
    assert foreign.error == "another run"
    assert seen.said == [("began", 0, 0), ("ended", 0, 1), ("began", 1, 0), ("ended", 1, 0)]


@pytest.mark.parametrize(
    ("kind", "refused", "says", "details"),
    [
        ("refused", True, "no such model", False),
        ("diverged", False, "step 3: nan", False),
        ("memory", False, "micro_batch = 1", True),
        ("torch", False, "RuntimeError: shapes differ", True),
        ("disk", False, "No space left on device", False),
    ],
)
def test_in_order_a_failure_is_a_result(toys, kind, refused, says, details):
    seen = Seen()
    bad, good = pool.run([toys.Toy(kind), toys.Toy("fine")], workers=1, threads=1, progress=seen)
    assert bad.record is None
    assert bad.refused == refused
    assert says in bad.error
    assert "\n" not in bad.error
    assert bool(bad.details) == details
    assert good.record == {"what": "fine", "threads": 1}
    assert of(seen, 1) == WHOLE


def test_a_fault_of_the_program_is_not_hidden(toys):
    with pytest.raises(toys.Stop):
        pool.run([toys.Toy("fault")], workers=1, threads=1, progress=Seen())


@pytest.mark.parametrize(("most", "threads"), [("1", 1), ("2", 2), ("64", 3), ("", 3), ("many", 3)])
def test_omp_num_threads_is_not_exceeded(toys, monkeypatch, most, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", most)
    (outcome,) = pool.run([toys.Toy("fine")], workers=1, threads=3, progress=Seen())
    torch.set_num_threads(1)
    assert outcome.record is not None
    assert outcome.record["threads"] == threads


@pytest.mark.parametrize(("quota", "most"), [("max 100000", 8), ("150000 100000", 2), ("nonsense", 8)])
def test_cores_of_a_container(monkeypatch, quota, most):
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _self: quota)
    assert pool.cores() == most


def test_signals_are_as_before(toys):
    before = signal.getsignal(signal.SIGTERM)
    pool.run([toys.Toy("fine")], workers=1, threads=1, progress=Seen())
    assert signal.getsignal(signal.SIGTERM) is before
