"""Squad: attacks that fit together are run as one fleet; each leaves the record that it would have left alone."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch

from immunity.attacks import fleet
from immunity.attacks.attack import Opening
from immunity.attacks.finetune import FineTune
from immunity.bench import pool
from immunity.bench.assault import Assault
from immunity.bench.jobs import Job
from immunity.bench.keeping import Tell, claimed, finished
from immunity.bench.shown import Shown
from immunity.bench.worker import Outcome
from immunity.errors import ImmunityError

MOST: Final = 16
"""Attackers in one fleet: their rows stand in memory side by side."""


@dataclass(frozen=True, kw_only=True)
class Squad(Job):
    """Several attacks on one model, trained in one forward and backward pass.

    Attributes:
        members: The attacks.
    """

    members: tuple[Assault, ...]
    kind: ClassVar[str] = "squad"

    def __post_init__(self) -> None:
        first = self.members[0]
        ids = "\n".join(sorted(str(member.folder) for member in self.members))
        object.__setattr__(self, "name", f"{len(self.members)} attacks as a fleet")
        object.__setattr__(
            self, "folder", first.folder.parent / f"fleet-{hashlib.sha256(ids.encode()).hexdigest()[:8]}"
        )

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"attack {self.members[0].defence}: {self.name}"

    @property
    def steps(self) -> int:
        """Of the longest attack."""
        return max(member.steps for member in self.members)

    @property
    def measured_at(self) -> frozenset[int]:
        """Where any of them is measured."""
        return frozenset().union(*(member.measured_at for member in self.members))

    def identity(self) -> dict[str, Any]:
        """Of all members."""
        return {member.name + str(member.attack.seed): member.identity() for member in self.members}

    def work(self, tell: Tell) -> dict[str, Any]:
        """Do what is not done yet, and leave each member its record."""
        with ExitStack() as held:
            todo = [m for m in self.members if held.enter_context(claimed(m.folder, m.identity())) is None]
            if todo:
                self._together(todo, tell)
        return {"kind": self.kind, "identity": self.identity(), "members": [m.title for m in self.members]}

    def _together(self, todo: Sequence[Assault], tell: Tell) -> None:
        found = todo[0].opening.load("merged")
        seen = [member.looked_at(found) for member in todo]
        del found  # the attackers open the files for themselves
        attacks = [member.attack for member in todo if isinstance(member.attack, FineTune)]
        curves = fleet.run_fleet(
            attacks,
            todo[0].opening,
            [member.attack.reads(member.data) for member in todo],
            [suite for _, suite, _ in seen],
            folders=[member.folder for member in todo],
            observes=[_furthest(tell)] * len(todo),
            enough=[member.stop for member in todo],
            at=[member.at for member in todo],
        )
        for member, curve, (rows, _, parameters) in zip(todo, curves, seen, strict=True):
            finished(member.folder, member.record(curve, rows, parameters))


def grouped(jobs: Sequence[Assault]) -> list[Job]:
    """The jobs, those that fit together as squads where a fleet is faster than its attackers one after another.

    The squads come first: they take longest, and nobody shall wait for one at the end.
    """
    tuned: dict[Opening, list[Assault]] = defaultdict(list)
    found: list[Job] = []
    for job in jobs:
        if isinstance(job.attack, FineTune) and fleet.fits(job.attack) and pays(job.opening):
            tuned[job.opening].append(job)
        else:
            found.append(job)
    for together in tuned.values():
        attacks = [job.attack for job in together if isinstance(job.attack, FineTune)]
        for group in fleet.groups(attacks, MOST):
            members = tuple(together[i] for i in group)
            found.append(Squad(members=members) if len(members) > 1 else members[0])
    return sorted(found, key=lambda job: not isinstance(job, Squad))


def crew(jobs: Sequence[Job], *, workers: int, threads: int | None, progress: Shown) -> list[Outcome]:
    """What became of the jobs, in their order; by default the workers share the cores."""
    if not jobs:
        return []
    with progress(jobs, [1.0] * len(jobs)) as shown:
        return pool.run(jobs, workers=workers, threads=threads or max(1, pool.cores() // workers), progress=shown)


def run(jobs: Sequence[Job], *, workers: int, threads: int | None, progress: Shown) -> dict[str, Outcome]:
    """Title -> outcome of every job; attacks that fit together go as squads, what a failed one left undone alone."""
    attacks = [job for job in jobs if isinstance(job, Assault)]
    others = [job for job in jobs if not isinstance(job, Assault)]
    first = crew([*grouped(attacks), *others], workers=workers, threads=threads, progress=progress)
    again = crew(alone(first), workers=workers, threads=threads, progress=progress)
    return {one.job.title: one for outcome in (*first, *again) for one in parted(outcome)}


def pays(opening: Opening) -> bool:
    """Whether attackers side by side are faster than one after another.

    On an accelerator, which one alone leaves idle. On a processor they are not: in an audit of the tiny model fleets
    took .9 to 1.1 times as long as their members by themselves, and several workers share single attacks more evenly.
    """
    return opening.device.startswith("cuda") or (opening.device == "auto" and torch.cuda.is_available())


def parted(outcome: Outcome) -> Iterable[Outcome]:
    """An outcome for each attack: a squad's members, whose records are on disk, or the one there is."""
    if not isinstance(outcome.job, Squad):
        return [outcome]
    return [_own(member, outcome) for member in outcome.job.members]


def alone(outcomes: Iterable[Outcome]) -> list[Assault]:
    """What a failed squad left undone: by itself an attack may fit in memory, or need not share another one's fault."""
    return [
        one.job
        for outcome in outcomes
        if isinstance(outcome.job, Squad) and outcome.record is None
        for one in parted(outcome)
        if isinstance(one.job, Assault) and one.record is None
    ]


def _own(member: Assault, outcome: Outcome) -> Outcome:
    try:
        record = member.kept()
    except ImmunityError as error:
        return Outcome(member, None, str(error), refused=True)
    return Outcome(member, record) if record else replace(outcome, job=member)


def _furthest(tell: Tell) -> Callable[[int, Mapping[str, float]], None]:
    """Progress of a squad: the step of its furthest member."""
    most = -1

    def told(done: int, trace: Mapping[str, float]) -> None:
        nonlocal most
        if done > most:
            most = done
            tell(done, trace)

    return told
