"""The terminal: warnings, failures, progress with the time left, and the command that goes on after Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from immunity.bench import store
from immunity.cli.pace import Pace, duration

if TYPE_CHECKING:
    from immunity.bench.jobs import Job
    from immunity.bench.worker import Outcome

out: Final = Console(highlight=False)
err: Final = Console(stderr=True, highlight=False)

_QUIET: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Read by libraries when they are imported, and inherited by the processes of a pool."""
WIDE: Final = 110
"""Columns from which on a bar also shows losses."""
EVERY: Final = 30.0
"""Seconds between two lines about a job where there is no terminal."""


def listen(*, verbose: bool) -> None:
    """Show what this library logs; what others log or warn of only with ``verbose``, unless it is an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without θ is no reason to stop
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[_Speaker(verbose=verbose)], level=logging.INFO, force=True)


class _Speaker(logging.Handler):
    """Prints above progress bars instead of through them, and everything once."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the user should see it."""
        if self.verbose:
            return True
        ours = record.name.partition(".")[0] == "immunity"
        return record.levelno >= (logging.WARNING if ours else logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        label, style = ("warning: ", "yellow") if record.levelno >= logging.WARNING else ("", "dim")
        said = record.getMessage()
        if record.exc_info and self.verbose and record.exc_info[1] is not None:
            said += f" ({record.exc_info[1]!r})"
        if said not in self.said:
            self.said.add(said)
            note(label, said, style)


def note(label: str, text: str, style: str) -> None:
    """One paragraph on stderr; in a file it stays one line, so that it can be searched for."""
    err.print(Text.assemble((label, f"bold {style}" if label else style), text), soft_wrap=not err.is_terminal)


def resume() -> None:
    """The command that goes on, on a line of its own that can be copied whole."""
    err.print(f"  {store.command()}", markup=False, soft_wrap=True)


def failures(outcomes: Sequence[Outcome]) -> None:
    """Say which jobs failed and why; nothing if none did."""
    failed = [outcome for outcome in outcomes if outcome.record is None]
    for outcome in failed:
        note("error: ", outcome.error if len(outcomes) == 1 else f"{outcome.job.title}: {outcome.error}", "red")
        if outcome.details:
            _keep(outcome)
    if failed and len(failed) < len(outcomes):
        err.print("What finished is kept. Once the cause is removed, the same command does the rest:")
        resume()


def _keep(outcome: Outcome) -> None:
    """A traceback helps whoever looks for the fault; it goes to a file."""
    path = outcome.job.folder / "error.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(outcome.details + "\n", encoding="utf-8")
    except OSError:
        err.print(outcome.details, markup=False)
        return
    err.print(f"The details are in {path}.", markup=False, soft_wrap=True)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if every job is done; 2 if those that are not were refused for what the user asked; 1 if one failed."""
    failed = [outcome for outcome in outcomes if outcome.record is None]
    if not failed:
        return 0
    return 2 if all(outcome.refused for outcome in failed) else 1


class Bars:
    """One bar for each job that is running and, of several jobs, one for all; plain lines where there is no terminal.

    Args:
        jobs: With ``title``, ``steps`` and ``measured_at``.
        costs: Of one step of each job, in gradients.
    """

    def __init__(self, jobs: Sequence[Job], costs: Sequence[float]) -> None:
        self.jobs = jobs
        self.pace = Pace(costs, [job.steps for job in jobs], [job.measured_at for job in jobs])
        self.start = time.monotonic()
        self.began_at: dict[int, float] = {}
        self.spoke_at: dict[int, float] = {}
        self.writing_since: dict[int, tuple[int, float]] = {}
        wide = err.width >= WIDE
        columns = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
            BarColumn(bar_width=16 if wide else 10),
            TextColumn("{task.fields[count]}", justify="right", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", justify="right", table_column=Column(no_wrap=True)),
        ]
        if wide:
            note = Column(no_wrap=True, overflow="ellipsis", ratio=2)
            columns.append(TextColumn("[dim]{task.fields[note]}", table_column=note))
        self.progress = Progress(*columns, console=err, transient=True, expand=True, disable=not err.is_terminal)
        self.whole = self._add("[bold]all together", 1.0) if len(jobs) > 1 else None
        self.tasks: dict[int, TaskID] = {}

    def _add(self, description: str, total: float) -> TaskID:
        return self.progress.add_task(description, total=total, count="", left="", note="")

    def began(self, index: int) -> None:
        """A job was begun; until its first step it opens its model."""
        job = self.jobs[index]
        self.tasks[index] = self._add(escape(job.title), job.steps)
        self.began_at[index] = self.spoke_at[index] = time.monotonic()
        self.progress.update(self.tasks[index], left="opening the model")
        if not err.is_terminal:
            err.print(f"started   {job.title}", markup=False, soft_wrap=True)

    def __call__(self, index: int, done: int, trace: Mapping[str, float]) -> None:
        """A job has done so many steps; before the first it may tell how far it is with what comes before."""
        job, now = self.jobs[index], time.monotonic()
        if not done and "to rewrite" in trace:
            return self._rewriting(index, int(trace["rewritten"]), int(trace["to rewrite"]), now)
        if not trace and done:
            err.print(f"goes on   {job.title}: from step {done}", markup=False, soft_wrap=True)
        self.pace.tell(index, done, now)
        shown = [f"{name} {value:.2f}" for name, value in trace.items() if "/" in name and "@" not in name]
        count = f"{done}/{job.steps}"
        self.progress.update(
            self.tasks[index],
            total=job.steps,
            completed=done,
            count=count,
            left=_left(self.pace.left(index)),
            note="  ".join(shown),
        )
        self._whole()
        if not err.is_terminal and now - self.spoke_at[index] >= EVERY and done < job.steps:
            self.spoke_at[index] = now
            told = [f"step {count}", _left(self.pace.left(index)), *shown]
            err.print(f"          {job.title}: {', '.join(filter(None, told))}", markup=False, soft_wrap=True)
        return None

    def _rewriting(self, index: int, done: int, of: int, now: float) -> None:
        """Data that are written before they are trained on: a bar of their own, in the place of the job's."""
        first, since = self.writing_since.setdefault(index, (done, now))
        left = _left((now - since) / (done - first) * (of - done) if done > first else None)
        count = f"rewriting {done}/{of}"
        self.progress.update(self.tasks[index], total=of, completed=done, count=count, left=left)
        if not err.is_terminal and now - self.spoke_at[index] >= EVERY and done < of:
            self.spoke_at[index] = now
            told = ", ".join(filter(None, (count, left)))
            err.print(f"          {self.jobs[index].title}: {told}", markup=False, soft_wrap=True)

    def ended(self, outcome: Outcome, index: int) -> None:
        """A job is done or has failed; failures are told at the end, where they are not overlooked."""
        self.pace.ended(index)
        self.progress.remove_task(self.tasks[index])
        self._whole()
        job = self.jobs[index]
        if outcome.inapplicable:
            word = "skipped   "
        elif outcome.record is None:
            word = "failed    "
        elif index not in self.pace.seen:
            word = "kept      "
        else:
            word = "finished  "
        took = duration(time.monotonic() - self.began_at[index])
        err.print(f"{word}{job.title}  ({took})", markup=False, soft_wrap=True)

    def _whole(self) -> None:
        if self.whole is not None:
            share = self.pace.share()
            left = _left(self.pace.left_in_all())
            self.progress.update(self.whole, completed=share, count=f"{share:.0%}", left=left)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: workers first."""


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the system's signature
    raise _Terminated


@contextmanager
def bars(jobs: Sequence[Job], costs: Sequence[float]) -> Iterator[Bars]:
    """Progress of ``jobs`` inside the ``with``; on Ctrl-C or SIGTERM the command that goes on from here."""
    shown = Bars(jobs, costs)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with shown.progress:
            yield shown
    except KeyboardInterrupt as stop:
        err.print("\nInterrupted. What was done up to the last checkpoint is kept; go on from there with:")
        resume()
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
