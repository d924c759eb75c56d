"""Run jobs: in order in this process, or side by side in a few others; a failed job is a result, not the end."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final, Protocol

import torch

from immunity.bench.jobs import Job
from immunity.bench.worker import Outcome, attempt, work
from immunity.errors import ImmunityError

_PATIENCE: Final = 5.0  # seconds for a worker to end


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
        threads: Torch threads of each; no more than ``OMP_NUM_THREADS``, where it is set.
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
        outcomes.append(attempt(job, _teller(i, progress)))
        progress.ended(outcomes[-1], i)
    return outcomes


@contextmanager
def kept() -> Iterator[None]:
    """Within it, the processes of one :func:`run` go on with the next one's jobs; starting one takes seconds."""
    if _SPARE:  # they are kept already
        yield
        return
    _SPARE.append([])
    try:
        yield
    finally:
        for worker in _SPARE.pop():
            worker.end(at_once=False)


def _teller(index: int, progress: Watcher) -> Callable[[int, Mapping[str, float]], None]:
    return lambda done, trace: progress(index, done, trace)


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
        self.process: SpawnProcess = context.Process(target=work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the line ends when the process does
        self.threads, self.index = threads, -1

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


_SPARE: Final[list[list[_Worker]]] = []


def _worker(threads: int) -> _Worker:
    """One that waits for a job, or a new one."""
    spare = _SPARE[-1] if _SPARE else []
    fit = next((i for i, one in enumerate(spare) if one.threads == threads and one.process.is_alive()), None)
    return _Worker(threads) if fit is None else spare.pop(fit)


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
                    self._begin(_worker(self.threads))
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
        elif _SPARE and worker.process.is_alive():
            _SPARE[-1].append(worker)
        else:
            worker.end(at_once=False)

    def _lost(self, worker: _Worker) -> None:
        """A process ended without a word: the system needed its memory, or the program has a fault."""
        worker.process.join(_PATIENCE)
        code = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = "most likely there was not enough memory; try fewer workers" if code == -9 else "what it said is above"
        self._ended(worker, Outcome(self.jobs[worker.index], None, f"its process ended unexpectedly ({how}): {why}"))
