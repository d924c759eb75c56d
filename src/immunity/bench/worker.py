"""What a worker does: one job after the other, over a line to whoever started it; a failure is an outcome."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Final

import torch

from immunity.bench.jobs import Job
from immunity.errors import INAPPLICABLE, DivergedError, ImmunityError

_FULL: Final = ("out of memory", "can't allocate memory", "not enough memory")


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

    @property
    def inapplicable(self) -> bool:
        """Whether there is no way to do it to this model, whoever tries."""
        return self.record is None and self.error.startswith(INAPPLICABLE)


def attempt(job: Job, tell: Callable[[int, Mapping[str, float]], None]) -> Outcome:
    """Do a job here and now; whatever goes wrong with it is an outcome."""
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


def work(line: Connection, threads: int) -> None:
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
            found = attempt(job, lambda done, trace: teller.say("step", done, dict(trace)))
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
