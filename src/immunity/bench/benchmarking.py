"""Benchmarks as jobs: one model, one task, in a folder of its own, kept when it is done."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from immunity.attacks.attack import Opening
from immunity.bench.jobs import Job
from immunity.bench.keeping import Tell, finished
from immunity.bench.prints import fingerprint
from immunity.errors import SettingsError
from immunity.measure import harness, inspection
from immunity.metrics.benchmarks import Row

By = Literal["lm-eval", "inspect"]
"""Whose tasks they are."""
_PACKAGES: Final = {"lm-eval": "lm-eval", "inspect": "inspect-ai"}
_READ: Final = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
"""What of a folder of tasks can change a number."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked; see :func:`immunity.measure.harness.rows`.

    Attributes:
        by: Whose tasks they are.
        tasks_folder: Where further tasks are described.
        limit: The first so many questions of a task.
        seed: Of what is drawn.
        shots: Examples before each question; of "lm-eval" only.
        chat: Whether a question is the user's turn; "inspect" knows nothing else.
        window: Tokens that the model reads at most.
        batch_size: Rows at once; changes no number but by rounding.

    Raises:
        SettingsError: "inspect" cannot do that.
    """

    by: By = "lm-eval"
    tasks_folder: Path | None = None
    limit: int | None = None
    seed: int = 0
    shots: int | None = None
    chat: bool = True
    window: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.by == "inspect" and (self.shots is not None or not self.chat):
            raise SettingsError("Inspect's tasks say themselves what is shown first, and are asked in a template only")

    def check(self, tasks: Sequence[str]) -> None:
        """Look whether there are such tasks.

        Raises:
            MissingExtraError: The package is not installed.
            SettingsError: There is no such task.
        """
        if self.by == "lm-eval":
            harness.known(tasks, self.tasks_folder)
        else:
            inspection.known(tasks, self.tasks_folder)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Job):
    """Ask one model the questions of one task.

    Attributes:
        name: As a person should read it.
        opening: The model's files.
        task: Of a benchmark.
        asking: How it is asked.
        folder: Where the record goes.
    """

    name: str
    opening: Opening
    task: str
    asking: Asking
    folder: Path
    kind: ClassVar[str] = "benchmark"

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"ask {self.name}: {self.task}"

    @property
    def steps(self) -> int:
        """One: nobody knows how many questions there are before they are read."""
        return 1

    @property
    def measured_at(self) -> frozenset[int]:
        """None: it does nothing else."""
        return frozenset()

    def identity(self) -> dict[str, Any]:
        """See :meth:`Hardening.identity`."""
        asking = asdict(self.asking)
        del asking["batch_size"]
        return {
            "model": {**asdict(self.opening), "weights": fingerprint(self.opening.source)},
            "task": self.task,
            "asking": asking | {"tasks_folder": _contents(self.asking.tasks_folder)},
            "version": _version(_PACKAGES[self.asking.by]),
        }

    def work(self, tell: Tell) -> dict[str, Any]:
        """See :meth:`Job.work`."""
        tell(0, {})
        rows = self._rows()
        tell(1, {"rows": float(len(rows))})
        record = {"kind": self.kind, "identity": self.identity(), "name": self.name, "task": self.task, "rows": rows}
        return finished(self.folder, record)

    def _rows(self) -> list[Row]:
        how, model = self.asking, self.opening.load("merged")
        if how.by == "lm-eval":
            return harness.rows(
                model,
                [self.task],
                folder=how.tasks_folder,
                limit=how.limit,
                seed=how.seed,
                shots=how.shots,
                chat=how.chat,
                batch_size=how.batch_size,
                window=how.window,
            )
        return inspection.rows(
            model,
            [self.task],
            folder=how.tasks_folder,
            limit=how.limit,
            seed=how.seed,
            batch_size=how.batch_size,
            window=how.window,
            logs=self.folder / "inspect",
        )


def _contents(folder: Path | None) -> str:
    """A fingerprint of the descriptions and data in a folder of tasks; "" without one."""
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in _READ and p.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
