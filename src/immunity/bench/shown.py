"""How the progress of jobs is shown: a bar on a terminal, or lines in the log where nobody looks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from immunity.bench.jobs import Job
from immunity.bench.pool import Watcher
from immunity.bench.worker import Outcome

_LOG = logging.getLogger(__name__)

Shown = Callable[[Sequence[Job], Sequence[float]], AbstractContextManager[Watcher]]
"""Shows how jobs get on, given the cost of a step of each."""


class Quiet:
    """Tells the log which jobs end, and how."""

    def began(self, index: int) -> None:
        """A job was begun."""

    def __call__(self, index: int, done: int, trace: Mapping[str, float]) -> None:
        """A job has done a step."""

    def ended(self, outcome: Outcome, index: int) -> None:
        """A job is done."""
        _LOG.info("%d, %s: %s", index, outcome.job.title, outcome.error or "done")


def quietly(jobs: Sequence[Job], costs: Sequence[float]) -> AbstractContextManager[Watcher]:  # noqa: ARG001
    """For use from Python: only the log."""
    return nullcontext(Quiet())
