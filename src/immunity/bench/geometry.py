"""Geometry: the losses around one saved model, as a job. A diagnostic beside an audit, and no part of its verdicts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from immunity.attacks.attack import Opening, needed
from immunity.bench import store
from immunity.bench.hardened import hardened
from immunity.bench.jobs import Job
from immunity.bench.keeping import Tell, data_row, finished, what_counts
from immunity.bench.prints import fingerprint
from immunity.data.corpus import Corpora, Corpus
from immunity.data.streams import tokenise
from immunity.measure.geometry import Probe, probed
from immunity.measure.suite import Suite
from immunity.mechanisms import LookAhead
from immunity.metrics import geometry
from immunity.models import all_weights, estimate

VERSION: Final = 1
PLACES: Final = ("model", "baseline")
"""What an audit's jobs look around, in order."""
ROLES: Final = ("harmful", "general", "benign")
PROBES: Final[Mapping[str, Probe]] = {
    "smoke": Probe(distances=(0.05, 0.2, 0.5, 1.0), draws=1, rows=8, measured=6, path_steps=0),
    "standard": Probe(),
    "full": Probe(draws=5, rows=32, measured=48, path_steps=16),
}
"""Tier of an audit -> what is looked at."""
_COPIES: Final = 4
"""Vectors of the size of the weights that are held at once, besides gradients and Adam's moments."""


@dataclass(frozen=True, kw_only=True)
class Geometry(Job):
    """Look around one model.

    Attributes:
        name: As a person should read it.
        opening: The model's files. A saved adapter is merged, and every weight is moved.
        data: Role -> what directions come from; "harmful" is needed, "benign" and "general" are used.
        held_out: The same -> what is measured; "general" is needed.
        probe: Where.
        word: What a trapped model says.
        folder: Where the record goes.
    """

    name: str
    opening: Opening
    data: Corpora
    held_out: Mapping[str, Corpus]
    word: str
    folder: Path
    probe: Probe = field(default_factory=Probe)
    kind: ClassVar[str] = "geometry"

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"probe {self.name}"

    @property
    def steps(self) -> int:
        """Points that are measured."""
        return self.probe.looks(benign="benign" in self.data)

    @property
    def measured_at(self) -> frozenset[int]:
        """None: it does nothing else."""
        return frozenset()

    @property
    def _followed(self) -> dict[str, Corpus]:
        return {role: needed(self.data, role, why="a probe") for role in ROLES if role in self.data}

    @property
    def _measured(self) -> dict[str, Corpus]:
        """As many rows of each kind as the probe asks for."""
        kinds = {role: self.held_out[role] for role in ROLES if role in self.held_out}
        return {role: corpus.take(min(self.probe.measured, len(corpus))) for role, corpus in kinds.items()}

    def identity(self) -> dict[str, Any]:
        """See :meth:`Hardening.identity`."""
        return {
            "model": {**asdict(self.opening), "weights": fingerprint(self.opening.source)},
            "probe": what_counts(asdict(self.probe)),
            "data": {role: corpus.fingerprint for role, corpus in self._followed.items()},
            "held out": {role: corpus.fingerprint for role, corpus in self._measured.items()},
            "word": self.word,
        }

    def on(self, shelf: Path) -> Geometry:
        """The same job, in the shelf's folder for it."""
        return replace(self, folder=store.shelved(shelf, "geometry", self.identity()))

    def work(self, tell: Tell) -> dict[str, Any]:
        """See :meth:`Job.work`."""
        began = time.perf_counter()
        model = all_weights(self.opening.load("merged"))
        estimate(model, copies=_COPIES)
        rows = [data_row(corpus, model) for corpus in self._followed.values()]
        rows += [data_row(corpus, model, "measured on ") for corpus in self._measured.values()]
        tell(0, {})
        done = 0

        def told(losses: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            tell(done, losses)

        data, held_out = (
            {role: tokenise(corpus, model.template, model.max_length) for role, corpus in chosen.items()}
            for chosen in (self._followed, self._measured)
        )
        found = probed(model, data, held_out, self.probe, word=self.word, tell=told)
        record = {
            "kind": self.kind,
            "identity": self.identity(),
            "name": self.name,
            "parameters": sum(p.numel() for p in model.network.parameters()),
            "probe": asdict(self.probe),
            "simulates": [
                asdict(one) for one in hardened(self.opening.source).mechanisms if isinstance(one, LookAhead)
            ],
            "data": rows,
            "seconds": round(time.perf_counter() - began, 1),
            **found,
        }
        return finished(self.folder, record)


def around(
    models: Sequence[str],
    opening: Opening,
    data: Corpora,
    suite: Suite,
    *,
    probe: Probe,
    folder: Path,
    shelf: Path | None = None,
) -> list[Geometry]:
    """A job for each model, all with the same data, word and directions' seeds.

    Args:
        models: The hardened one first, then its baseline, if there is one.
        opening: How each is opened.
        data: What an attacker and an honest user have.
        suite: Its held-out rows are measured, and its collapse word is looked for ("error" if it has none).
        probe: Where.
        folder: Each job gets a folder of its own in it.
        shelf: Where the baseline's is kept instead, for other audits against the same one.
    """
    kinds = {"harmful": suite.harmful, "general": suite.general, "benign": suite.benign}
    held_out = {role: corpus for role, corpus in kinds.items() if corpus is not None}
    jobs = [
        Geometry(
            name=source,
            opening=replace(opening, source=source),
            data=data,
            held_out=held_out,
            word=suite.collapse_word or "error",
            folder=folder / role,
            probe=probe,
        )
        for source, role in zip(models, PLACES, strict=False)
    ]
    return jobs if shelf is None else [jobs[0], *(job.on(shelf) for job in jobs[1:])]


def told(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a result keeps under "geometry" (a probe's) or "audit", "geometry" (an audit's).

    Args:
        records: "model" and, where it came to an end, "baseline" -> record of its job. Both are compared at the
            distance that the first one's harmful direction names.

    Returns:
        "version", "word", "probe", and "models": for each its "role", "name", "simulates" (what its record says that
        the defence walks itself), "curves", "draws", "chance", and the "summary" that
        :func:`immunity.metrics.geometry.summary` makes of them.
    """
    first = next(iter(records.values()))
    at = geometry.bottom(first)
    kept = ("name", "simulates", "chance", "curves", "draws")
    found: dict[str, Any] = store.plain(
        {
            "version": VERSION,
            "word": first["word"],
            "probe": first["probe"],
            "models": [
                {"role": role, **{key: record[key] for key in kept}, "summary": geometry.summary(record, at)}
                for role, record in records.items()
            ],
        }
    )
    return found


def beside(jobs: Sequence[Geometry], done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What an audit's result keeps under "geometry": of those jobs that came to an end; {} if none did.

    Args:
        jobs: Of :func:`around`.
        done: Title -> record.
    """
    records = {role: done[job.title] for role, job in zip(PLACES, jobs, strict=False) if job.title in done}
    return told(records) if records else {}
