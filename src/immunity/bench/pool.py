"""Run jobs: in order in this process, or side by side in a few others; a failed job is a result, not the end."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

import torch

from immunity.bench.jobs import Job
from immunity.errors import DivergedError, ImmunityError

_FULL: Final = ("out of memory", "can't allocate memory", "not enough memory")
_PATIENCE: Final = 5.0  # seconds for a worker to end


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: The job.
        record: What it found, or None if it failed.
        error: Why it failed, for the user.
        refused: Whether it was refused for a reason that the user can change, before it had computed anything.
        details: The traceback of a failure that nobody foresaw.
    """

    job: Job
    record: dict[str, Any] | None
    error: str = ""
    refused: bool = False
    details: str = ""


class Watcher(Protocol):
    """Whoever wants to know how the jobs get on."""

    def began(self, index: int) -> None:
        """A job was begun."""

    def __call__(self, index: int, done: int, trace: Mapping[str, float]) -> None:
        """A job has done so many steps."""

    def ended(self, outcome: Outcome, index: int) -> None:
        """A job is done or has failed."""


def cores() -> int:
    """Cores that this process may use: its affinity, and in a container the share of time that it is given."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return found
    return found if quota == "max" else max(1, min(found, math.ceil(int(quota) / int(period))))


def run(jobs: Sequence[Job], *, workers: int, threads: int, progress: Watcher) -> list[Outcome]:
    """Run all jobs; with one worker, here and in order.

    Args:
        jobs: Independent of one another.
        workers: Processes. With more than one, each loads its own model.
        threads: Torch threads of each; ``OMP_NUM_THREADS``, where it is set, is not exceeded.
        progress: Told of every job and every training step.
    """
    most = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(most)) if most.isdecimal() and int(most) else threads
    if workers > 1 and len(jobs) > 1:
        return _Crew(jobs, threads, progress).run(min(workers, len(jobs)))
    torch.set_num_threads(threads)
    outcomes = []
    for i, job in enumerate(jobs):
        progress.began(i)
        outcomes.append(_one(job, _teller(i, progress)))
        progress.ended(outcomes[-1], i)
    return outcomes


def _teller(index: int, progress: Watcher) -> Callable[[int, Mapping[str, float]], None]:
    return lambda done, trace: progress(index, done, trace)


def _one(job: Job, tell: Callable[[int, Mapping[str, float]], None]) -> Outcome:
    try:
        return Outcome(job, job(tell))
    except ImmunityError as error:
        return Outcome(job, None, str(error), refused=not isinstance(error, DivergedError))
    except (RuntimeError, OSError, MemoryError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, MemoryError) or any(sign in said for sign in _FULL):
            said = (
                f"out of memory: {said}. Needed is less: micro_batch = 1, a LoRA adapter instead of every weight, "
                "a smaller max_length or batch, fewer jobs side by side"
            )
        elif isinstance(error, OSError):
            return Outcome(job, None, f"the system says: {error}")
        else:
            said = f"{type(error).__name__}: {said}"
        return Outcome(job, None, said, details="".join(traceback.format_exception(error)).strip())


def _known(job: Job) -> Outcome | None:
    """What can be said of a job without doing it: it is done, or its folder is another's."""
    try:
        record = job.kept()
    except ImmunityError as error:
        return Outcome(job, None, str(error), refused=True)
    return None if record is None else Outcome(job, record)


class _Worker:
    """A process of ours and the line to it."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the line ends when the process does
        self.index = -1

    def give(self, index: int, job: Job) -> None:
        self.index = index
        self.line.send((index, job))

    def end(self, *, at_once: bool) -> None:
        """No more jobs; at once if what runs there shall stop: it is on disk up to its last checkpoint."""
        if at_once:
            self.process.terminate()
        self.line.close()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Crew:
    """Workers, and which job each of them does."""

    def __init__(self, jobs: Sequence[Job], threads: int, progress: Watcher) -> None:
        self.jobs, self.threads, self.progress = jobs, threads, progress
        self.waiting: deque[int] = deque()
        self.outcomes: dict[int, Outcome] = {}
        self.workers: dict[Connection, _Worker] = {}

    def run(self, most: int) -> list[Outcome]:
        """Do all jobs with at most so many workers; whatever happens, none of them is left behind."""
        for i, job in enumerate(self.jobs):
            if (known := _known(job)) is None:
                self.waiting.append(i)
            else:  # no process is started for what is done
                self.progress.began(i)
                self.outcomes[i] = known
                self.progress.ended(known, i)
        try:
            while len(self.outcomes) < len(self.jobs):
                while self.waiting and len(self.workers) < most:
                    self._begin(_Worker(self.threads))
                for line in wait(list(self.workers)):
                    self._hear(self.workers[line])  # type: ignore[index]
        finally:
            for worker in self.workers.values():
                worker.process.terminate()  # all of them, before one is waited for
            for worker in self.workers.values():
                worker.end(at_once=True)
        return [self.outcomes[i] for i in range(len(self.jobs))]

    def _begin(self, worker: _Worker) -> None:
        index = self.waiting.popleft()
        self.workers[worker.line] = worker
        self.progress.began(index)
        try:
            worker.give(index, self.jobs[index])
        except BrokenPipeError:
            self._lost(worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.line.recv()
        except (EOFError, ConnectionError):
            return self._lost(worker)
        match said:
            case ("step", done, trace):
                self.progress(worker.index, done, trace)
            case ("log", name, level, text):
                logging.getLogger(name).log(level, "%s", text)
            case ("ended", answer):
                self._ended(worker, Outcome(self.jobs[worker.index], **answer))
        return None

    def _ended(self, worker: _Worker, outcome: Outcome) -> None:
        index = worker.index
        self.outcomes[index] = outcome
        self.progress.ended(outcome, index)
        del self.workers[worker.line]
        if self.waiting and worker.process.is_alive():
            self._begin(worker)
        else:
            worker.end(at_once=False)

    def _lost(self, worker: _Worker) -> None:
        """A process ended without a word: the system needed its memory, or the program has a fault."""
        worker.process.join(_PATIENCE)
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = "most likely there was not enough memory; try fewer workers" if code == -9 else "what it said is above"
        self._ended(worker, Outcome(self.jobs[worker.index], None, f"its process ended unexpectedly ({how}): {why}"))


def _work(line: Connection, threads: int) -> None:
    """What a worker does until it is told nothing more, or whoever started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    signal.signal(signal.SIGTERM, _stop)  # by an exception, so that libraries can tidy up
    threading.Thread(target=_follow, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(threads)
    teller = _Teller(line)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_Relay(teller)], level=logging.INFO, force=True)
    try:
        while True:
            try:
                _, job = line.recv()
            except EOFError:
                return
            found = _one(job, lambda done, trace: teller.say("step", done, dict(trace)))
            teller.say("ended", {k: getattr(found, k) for k in ("record", "error", "refused", "details")})
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an exception while Python shuts down would only be noise


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the system's signature
    raise SystemExit(128 + number)


def _follow() -> None:
    """End when the parent does, were it by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Teller:
    """Says things over a line, one after the other, from whatever thread."""

    def __init__(self, line: Connection) -> None:
        self.line, self.lock = line, threading.Lock()

    def say(self, *what: object) -> None:
        with self.lock:
            self.line.send(what)


class _Relay(logging.Handler):
    """What a worker logs is logged where the user looks."""

    def __init__(self, teller: _Teller) -> None:
        super().__init__()
        self.teller = teller

    def emit(self, record: logging.LogRecord) -> None:
        self.teller.say("log", record.name, record.levelno, record.getMessage())
