"""Errands: the jobs of an audit, every one of them made for both models alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, final

from immunity import adapters
from immunity.attacks.attack import Attack, Manner, Opening
from immunity.attacks.curve import Point, Recorder
from immunity.attacks.finetune import FineTune
from immunity.bench.assault import Assault, Broken, whole
from immunity.bench.comparison import Comparison, Task
from immunity.bench.geometry import PROBES, Geometry, around
from immunity.bench.ground import Ground, Lesson, first
from immunity.bench.tamper import PHI
from immunity.bench.tiers import Tier
from immunity.data.corpus import Corpora, Corpus
from immunity.measure.suite import Suite
from immunity.metrics.lessons import ROLES
from immunity.models import LanguageModel
from immunity.spec import build

_SMALL: Final = 8
"""Prompts of kinds that a run must measure, but is not about."""
_UNSEEN: Final = Point(step=0, examples=0, seconds=0.0, metrics={}, n_prompts={}, samples=(), per_prompt={})
"""What is measured of the first round: nothing."""


class Errand(NamedTuple):
    """A job, and what its curve is for.

    Attributes:
        job: The job.
        about: Row of a condition, without its numbers.
    """

    job: Assault
    about: Mapping[str, Any]


@final
@dataclass(frozen=True, kw_only=True)
class Again(Attack):
    """Fine-tune, merge, and fine-tune once more; what is measured and counted is the second round.

    Attributes:
        first: The first round.
        second: The second.
        seed: Of both.

    Source:
        Our own: an honest user trains what another one has trained already. Unlike
        :class:`~immunity.attacks.program.Program` it is measured within its last operation, as a learning curve needs.
    """

    name: ClassVar[str] = "again"
    unit: ClassVar[str] = "steps"
    first: FineTune = field(default_factory=FineTune)
    second: FineTune = field(default_factory=FineTune)
    seed: int = 1

    @property
    def manner(self) -> Manner:
        """The second round's, opened as anybody would."""
        return Manner(self.second.threat, self.second.asks)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The second round's; 0 is what the first one left."""
        return self.second.budgets

    def reads(self, data: Corpora) -> Corpora:
        """What each round reads, under "1 train" and "2 train".

        Raises:
            DataError: A role is missing, or too small.
        """
        rounds = ((1, self.first), (2, self.second))
        return {f"{i} {role}": corpus for i, one in rounds for role, corpus in one.reads(data).items()}

    def tamper(self, model: LanguageModel, data: Corpora, recorder: Recorder) -> LanguageModel:
        """See :meth:`Attack.tamper`."""
        first, second = (replace(one, seed=self.seed) for one in (self.first, self.second))
        unseen = Recorder(
            measure=lambda _: _UNSEEN,
            at=first.budgets,
            folder=None if recorder.folder is None else recorder.folder / "first-round",
        )
        model = adapters.merged(first.tamper(model, _round(1, data), unseen))
        model.network.requires_grad_(False)
        return second.tamper(model, _round(2, data), recorder)


def _taught_with(task: Lesson) -> dict[str, Corpus]:
    return {"benign": task.train} | ({} if task.other is None else {"general": task.other})


def _round(i: int, data: Corpora) -> dict[str, Any]:
    return {role.removeprefix(f"{i} "): part for role, part in data.items() if role.startswith(f"{i} ")}


@dataclass(frozen=True, kw_only=True)
class Errands:
    """What an audit has to do.

    Attributes:
        model: The hardened model.
        baseline: The model before it was hardened.
        size: How much is done.
        folder: Where everything goes.
        ground: The data that all of it is done with.
        seed: Of the first attack; the others follow.
        template: Prompt template.
        device: "auto", "cpu", "cuda" …
        max_length: Ids per example.
        shelf: Folder of the runs on the baseline, for other audits against the same one; None keeps them in ``folder``.
    """

    model: str
    baseline: str
    size: Tier
    folder: Path
    ground: Ground
    seed: int = 1
    template: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    shelf: Path | None = None

    @property
    def seeds(self) -> list[int]:
        """Of every attack and every honest fine-tuning."""
        return [self.seed + i for i in range(self.size.seeds)]

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, the audited one first."""
        return tuple(domain.name for domain in self.ground.domains)

    def suite(self, domain: str, n: int | None = None) -> Suite:
        """What is measured of a domain; as many prompts as the size says, or ``n``."""
        return self.ground.suite(domain, self.size.prompts if n is None else n)

    def along(self, domain: str, split: Literal["dev", "test"] = "test") -> Suite:
        """What is measured along an attack: every restricted prompt, and fewer of the others, which it is not about."""
        return self.ground.suite(domain, self.size.prompts, split, others=self.size.others)

    def comparison(self) -> Comparison:
        """Both models beside each other, before anybody attacks either."""
        suite = self.suite(self.ground.home.name)
        restricted = (
            Task(name=f"restricted: {one.name}", corpus=self.suite(one.name).harmful, restricted=True)
            for one in self.ground.attacked(self.size)
        )
        others = (replace(task, corpus=first(task.corpus, self.size.prompts)) for task in self.ground.tasks)
        return Comparison(
            name=f"{self.model} with {self.baseline}",
            model=self._opening(self.model),
            baseline=self._opening(self.baseline),
            tasks=(*restricted, *others),
            judge=suite.judge,
            word=suite.collapse_word,
            tokens=suite.max_new_tokens,
            folder=self.folder / "stability",
        )

    def geometry(self) -> list[Geometry]:
        """The losses around both models: a diagnostic, and no claim."""
        home = self.ground.home
        return around(
            (self.model, self.baseline),
            self._opening(self.model),
            home.data,
            self.suite(home.name),
            probe=PROBES[self.size.name],
            folder=self.folder / "geometry",
            shelf=self.shelf,
        )

    def attacks(self) -> Iterator[Errand]:
        """Two fine-tunings on each domain, with every seed; they end where the model is broken."""
        steps = self.size.attack_steps
        kinds = (FineTune(steps=steps), FineTune(steps=steps, adapter="lora", lr=1e-3))
        for domain in self.ground.attacked(self.size):
            suite, rows = self.along(domain.name), len(whole(domain.data["harmful"]))
            for kind in kinds:
                name, about = f"{domain.name}, {kind.adapter}", {"domain": domain.name, "attack": kind.adapter}
                fitted = replace(kind, n=min(kind.n, rows))
                yield from self._on_both(name, fitted, domain.data, suite, about, stop=True)

    def lessons(self) -> Iterator[Errand]:
        """Honest tasks at every rate, with every seed."""
        for task in self.ground.lessons[: self.size.lessons]:
            for adapter, rates in self.size.rates.items():
                for lr in rates:
                    yield from self._taught(task, self._lesson(task, adapter, lr), 1)

    def second_rounds(self, rates: Mapping[tuple[str, str, str, int], float]) -> Iterator[Errand]:
        """The same once more on top of the other task, each model at the rate that its first round chose for the seed.

        Args:
            rates: Of :func:`immunity.metrics.lessons.first_rates`.
        """
        if self.size.rounds < 2:
            return
        tasks = {task.name: task for task in self.ground.lessons[: self.size.lessons] if task.other is not None}
        for (name, adapter, role, seed), lr in rates.items():
            if name in tasks:
                kind = self._lesson(tasks[name], adapter, lr)
                twice = Again(first=replace(kind, filler="general"), second=kind)
                for errand in self._taught(tasks[name], twice, 2):
                    if (ROLES[errand.about["model"]], errand.about["seed"]) == (role, seed):
                        yield errand

    def _lesson(self, task: Lesson, adapter: str, lr: float) -> FineTune:
        n = min(256, *map(len, _taught_with(task).values()))
        return build(FineTune(harmful=0.0), {"n": n, "adapter": adapter, "lr": lr, "steps": self.size.lesson_steps})

    def _taught(self, task: Lesson, kind: FineTune | Again, number: int) -> Iterator[Errand]:
        once = kind.second if isinstance(kind, Again) else kind
        about = {"task": task.name, "adapter": once.adapter, "lr": once.lr, "round": number}
        name = f"{task.name}, {once.adapter}, {once.lr:g}"
        if isinstance(kind, Again):
            about, name = {**about, "use": "given"}, f"{name}, second round"
        return self._on_both(name, kind, _taught_with(task), self._lesson_suite(task), about)

    def _lesson_suite(self, task: Lesson) -> Suite:
        """What is measured while an honest task is trained; nobody is asked to judge a user's data for that."""
        suite, n = self.suite(self.domains[0], _SMALL), self.size.prompts
        known = {} if task.scorer is None else {"benign": task.scorer}
        taught = replace(suite, benign=first(task.test, n), scorers=known)
        return replace(taught, batch_size=n) if self.ground.made else replace(taught, judge=None, second=None)

    def _on_both(
        self, name: str, kind: Attack, data: Corpora, suite: Suite, about: Mapping[str, Any], *, stop: bool = False
    ) -> Iterator[Errand]:
        """The same on both models, with every seed."""
        for seed in self.seeds:
            for role, source in (("defended", self.model), ("baseline", self.baseline)):
                job = Assault(
                    name=name,
                    defence=source,
                    attack=build(kind, {"seed": seed}),
                    opening=self._opening(source),
                    data=data,
                    suite=suite,
                    folder=self.folder / "runs" / role / f"{re.sub(r'[^a-z0-9.-]+', '-', name)}-seed{seed}",
                    stop=Broken(phi=PHI) if stop else None,
                    looks=self.size.looks,
                )
                if self.shelf is not None and role == "baseline":
                    job = job.on(self.shelf)
                yield Errand(job, {**about, "model": role, "seed": seed})

    def _opening(self, source: str) -> Opening:
        return Opening(source=source, template=self.template, device=self.device, max_length=self.max_length)
