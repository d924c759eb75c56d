"""Jobs, which are resumed where they were killed; the first kind hardens a model and saves it."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, final

from immunity.attacks.attack import Opening
from immunity.bench import memory, store
from immunity.bench.keeping import Clock, Tell, claimed, data_row, finished, what_counts
from immunity.bench.prints import fingerprint, prompt_prints
from immunity.data.corpus import Corpora
from immunity.data.dealt import dealt
from immunity.data.written import shown
from immunity.mechanisms import written
from immunity.method import Method, Run, parts, problems, refuse
from immunity.methods import METHODS
from immunity.models import LanguageModel, LoRA, all_weights, attach, estimate, save
from immunity.weight_edit import WeightEdit

MODEL: Final = "model"


class Job(ABC):
    """A piece of work in a folder of its own; a frozen dataclass, so that it can go to another process."""

    kind: ClassVar[str]
    name: str
    folder: Path

    @property
    @abstractmethod
    def title(self) -> str:
        """The job in one line."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Training steps."""

    @property
    @abstractmethod
    def measured_at(self) -> frozenset[int]:
        """Steps after which a measurement takes its time."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes this job this job; a folder of another one is refused, not overwritten."""

    @abstractmethod
    def work(self, tell: Tell) -> dict[str, Any]:
        """Do it from wherever the folder says it stands, and return the record."""

    @final
    def kept(self) -> dict[str, Any] | None:
        """The record, if the job is done.

        Raises:
            ResumeError: The folder holds another job.
        """
        return store.claim(self.folder, self.identity(), write_card=False)

    @final
    def __call__(self, tell: Tell) -> dict[str, Any]:
        """Do it, or return its record if it is done.

        Raises:
            SettingsError: Method, model and data do not fit together.
            ResumeError: The folder holds another job, or another process is in it.
        """
        with claimed(self.folder, self.identity()) as done:
            return self.work(tell) if done is None else done


@dataclass(frozen=True, kw_only=True)
class Hardening(Job):
    """Harden one model with one method and save it under ``folder``/model.

    Attributes:
        name: As a person should read it.
        method: The defence.
        opening: The model to start from.
        data: Role -> corpora.
        run: Training settings; its folder and observer are set by the job.
        folder: Where everything of this job goes.
        lora: A fresh adapter to train, or None to train every weight.
        saved_merged: Save a plain model rather than the adapter.
    """

    name: str
    method: Method
    opening: Opening
    data: Corpora
    run: Run
    folder: Path
    lora: LoRA | None = None
    saved_merged: bool = False
    kind: ClassVar[str] = "harden"

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"harden {self.name}"

    @property
    def steps(self) -> int:
        """Training steps; an edit of weights counts as one."""
        return self.run.fit.steps if self.method.trains else 1

    @property
    def measured_at(self) -> frozenset[int]:
        """Steps after which a measurement takes its time: none."""
        return frozenset()

    def identity(self) -> dict[str, Any]:
        """What makes this job this job; a folder of another one is refused, not overwritten."""
        return {
            "method": method_name(self.method),
            "settings": asdict(self.method),  # type: ignore[call-overload]
            "fit": what_counts(asdict(self.run.fit)),
            "rows": {role: self.run.rows(role) for role in self.method.reads},
            "model": {**asdict(self.opening), "weights": fingerprint(self.opening.source)},
            "adapter": None if self.lora is None else asdict(self.lora),
            "merged": self.saved_merged,
            "data": {role: [p.fingerprint for p in parts(corpus)] for role, corpus in self.data.items()},
            **({"base": _base(self.method)} if isinstance(self.method, WeightEdit) else {}),
        }

    def work(self, tell: Tell) -> dict[str, Any]:
        """See :meth:`Job.work`."""
        model = self._opened()
        refuse(problems(self.method, model, self.data))
        if self.method.trains:
            estimate(model, copies=3)
        data = dealt(self.method.reads, self.data)
        rows = [
            data_row(part, model) | {"prompts": prompt_prints(part)}
            for role in self.method.reads
            for part in parts(data[role])
        ]  # fmt: skip
        clock = Clock(tell)
        with memory.watched(model.network) as watch:
            self.method.immunise(model, data, replace(self.run, folder=self.folder, observe=clock))
        for half in self.folder.glob(f".{MODEL}.*"):  # what a kill in the middle of saving leaves
            shutil.rmtree(half)
        save(model, self.folder / MODEL, merged=self.saved_merged)
        return finished(self.folder, self._record(model, clock, watch.peak, rows))

    def _opened(self) -> LanguageModel:
        model = self.opening.load("merged")
        if self.lora is None:  # what is not trained stays in the precision that it was opened in
            return all_weights(model) if self.method.trains else model
        return attach(model, self.lora)

    def _record(
        self, model: LanguageModel, clock: Clock, peak: int | None, rows: list[dict[str, Any]]
    ) -> dict[str, Any]:
        per_step = clock.per_step
        return {
            "kind": self.kind,
            "identity": self.identity(),
            "name": self.name,
            "method": method_name(self.method),
            "settings": asdict(self.method),  # type: ignore[call-overload]
            "mechanisms": written(self.method.mechanisms),
            "fit": asdict(self.run.fit),
            "adapter": "every weight" if self.lora is None else asdict(self.lora),
            "saved": "model" if self.lora is None or self.saved_merged else "adapter",
            "seed": self.run.fit.seed,
            "steps": self.steps,
            "seconds": None if per_step is None else round(per_step * self.steps, 3),
            "seconds_per_step": None if per_step is None else round(per_step, 5),
            "peak_memory_bytes": peak,
            "parameters": sum(p.numel() for p in model.network.parameters()),
            "data": rows,
            "written": shown(self.folder),
            "log": store.thinned(store.log(self.folder)),
        }


def _base(method: WeightEdit) -> str:
    """The fingerprint of what an edit is measured against; "" if nobody has said."""
    return fingerprint(method.base) if method.base else ""


def method_name(method: Method) -> str:
    """The command-line name of a method; one of somebody else's has its class's."""
    return {cls: name for name, cls in METHODS.items()}.get(type(method), type(method).__name__.lower())
