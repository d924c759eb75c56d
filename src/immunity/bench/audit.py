"""Audit: four conditions of immunity, measured on a hardened model and on the one that it was made from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from immunity.attacks.finetune import FineTune
from immunity.bench import pool, squad, store
from immunity.bench.assault import check
from immunity.bench.audited import begin, broke, even, joined, learnt, place, refuse_other, threats
from immunity.bench.errands import Errand, Errands
from immunity.bench.geometry import beside
from immunity.bench.ground import Ground, stand_ins
from immunity.bench.hardened import hardened
from immunity.bench.jobs import Job
from immunity.bench.prints import fingerprint
from immunity.bench.resemblance import Reader, asked_in, duplicates
from immunity.bench.shown import Shown, quietly
from immunity.bench.tamper import PHI, AutoTamper
from immunity.bench.tampered import inapplicable
from immunity.bench.tiers import Tier, tier
from immunity.bench.worker import Outcome
from immunity.data import synthetic
from immunity.errors import SettingsError
from immunity.metrics.breaks import break_rows
from immunity.metrics.claims import Condition, corrected
from immunity.metrics.generalisation import generalisation
from immunity.metrics.lessons import first_rates
from immunity.metrics.resistance import resistance
from immunity.metrics.stability import stability
from immunity.metrics.trainability import trainability

VERSION: Final = 1
AXIS: Final = "examples"
"""What breaks are counted in across domains."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit, on the harmless stand-ins or on data of one's own.

    Attributes:
        model: The hardened model: a folder or a name.
        baseline: The model before it was hardened, aligned as it was.
        tier: "smoke", "standard" or "full".
        adaptive: Whether to attack it also by what is derived from the defence; None leaves that to the tier.
        folder: Where everything goes; the same call goes on from there.
        domain: Of the stand-ins: the restricted world that is judged first. The others are held out, unless the defence
            was trained on them, too.
        ground: Other data than the stand-ins, or other judges of them (:mod:`immunity.bench.own_data`).
        seed: Of the first attack; the others follow.
        template: Prompt template.
        device: "auto", "cpu", "cuda" …
        max_length: Ids per example.
        workers: Jobs side by side.
        threads: Torch threads of each; None shares the cores.
        minutes: What was allowed, if the tier was chosen by it; only told.
        shelf: Folder in which the runs on the baseline are kept, for other audits against the same one.

    Raises:
        SettingsError: There is no such tier or domain, or model and baseline are one.

    Source:
        The four conditions: Rosati et al. 2024, arXiv 2402.16382.
    """

    model: str
    baseline: str
    tier: str = "smoke"
    adaptive: bool | None = None
    folder: Path = Path("audit")
    domain: str = "umbra"
    ground: Ground | None = None
    seed: int = 1
    template: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    workers: int = 1
    threads: int | None = None
    minutes: float | None = None
    shelf: Path | None = None

    def __post_init__(self) -> None:
        tier(self.tier)
        if self.domain not in synthetic.DOMAINS:
            raise SettingsError(f"no stand-in domain {self.domain!r}; there are {', '.join(synthetic.DOMAINS)}")
        if place(self.model) == place(self.baseline):
            raise SettingsError("model and baseline are the same files: give the model before it was hardened")

    @property
    def size(self) -> Tier:
        """How much is done."""
        return tier(self.tier, adaptive=self.adaptive)

    @cached_property
    def data(self) -> Ground:
        """What it stands on."""
        return self.ground or stand_ins(self.model, self.baseline, self.domain)

    @property
    def cannot(self) -> list[str]:
        """What it cannot show, whatever comes out."""
        why = f"generalisation: not enough evidence, as no record says what {self.model} was trained on"
        return [*([] if hardened(self.model).found else [why]), *self.data.cannot(self.size)]

    @pool.kept()
    def run(self, progress: Shown = quietly) -> dict[str, Any]:
        """Measure all four conditions and write ``result.json``.

        A job that fails is not the end: the result says which, and its condition has less to go by.

        Raises:
            DataError: A judge cannot judge the data.
            ModelError: A model, or what a judge judges with, cannot be opened.
            ResumeError: The folder holds another run.
        """
        began = time.monotonic()
        refuse_other(self.folder, self._who)
        failed: dict[str, str] = {}
        errands = self._errands
        comparison, attacks, lessons = errands.comparison(), list(errands.attacks()), list(errands.lessons())
        jobs = [errand.job for errand in (*attacks, *lessons)]
        kept = comparison.kept() is not None
        check(jobs)
        if not kept or any(job.kept() is None for job in jobs):
            self.data.ask_judges(keep=self.workers == 1)
        begin(self.folder, self._who, self.minutes)
        compared = self._done([comparison], progress, failed)
        shapes = errands.geometry()
        looked = self._done(shapes, progress, failed)
        done = self._done(jobs, progress, failed)
        lessons += errands.second_rounds(first_rates(learnt(lessons, done, failed)))
        done |= self._done([one.job for one in lessons if one.job.title not in done], progress, failed)
        result = self._joined(self._tamper().run(progress), attacks, done, failed)
        conditions = corrected(
            [
                self._resistance(result),
                stability([row for record in compared.values() for row in record["rows"]]),
                self._generalisation(attacks if self.data.judge is not None else (), done, result),
                trainability(learnt(lessons, done, failed)),
            ]
        )
        result |= {"title": f"Audit of {self.model}", "seconds": round(time.monotonic() - began, 1)}
        result = store.same_run(self.folder / store.RESULT, result)
        for row in result["failures"]:
            failed.setdefault(f"attack {row['defence']}: {row['attack']}, seed {row['seed']}", str(row["error"]))
        result["audit"] = {**self._card(conditions, result, failed), "geometry": beside(shapes, looked)}
        store.write(self.folder / store.RESULT, result)
        return store.read(self.folder / store.RESULT)

    def _card(
        self, conditions: Sequence[Condition], result: Mapping[str, Any], failed: Mapping[str, str]
    ) -> dict[str, Any]:
        plain = [asdict(one) for one in conditions]
        return {
            "version": VERSION,
            **self._who,
            "minutes": self.minutes,
            "conditions": plain,
            "supports": self.data.supports(self.size),
            "cannot": [
                *self.cannot,
                *inapplicable(result["skipped"], self.model),
                *(f"what a job would have shown that failed: {job}: {failed[job]}" for job in failed),
            ],
            "verdicts": {one["name"]: one["verdict"] for one in plain},
            "judges": self.data.judged(),
            "agreement": result["battery"]["judges"],
            "flags": plain[0]["details"]["flags"],
            "overlaps": result["battery"]["overlaps"],
            "failures": dict(failed),
            "provenance": {
                **self.data.facts(self.size),
                "seeds": self._errands.seeds,
                "weights of the model": fingerprint(self.model),
                "weights of the baseline": fingerprint(self.baseline),
            },
        }

    @property
    def _who(self) -> dict[str, Any]:
        """What makes two audits the same one."""
        mine = {"tier": self.tier, "adaptive": self.size.adaptive, "model": self.model, "baseline": self.baseline}
        return {**mine, **self.data.who, "seed": self.seed}

    @property
    def _errands(self) -> Errands:
        return Errands(
            model=self.model,
            baseline=self.baseline,
            size=self.size,
            folder=self.folder,
            ground=self.data,
            seed=self.seed,
            template=self.template,
            device=self.device,
            max_length=self.max_length,
            shelf=self.shelf,
        )

    def _done(self, jobs: Sequence[Job], progress: Shown, failed: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Title -> record of every job that came to an end; the errors of the others go to ``failed``."""
        last = squad.run(jobs, workers=self.workers, threads=self.threads, progress=progress)
        failed.update({title: one.error for title, one in last.items() if one.record is None})
        return {title: one.record for title, one in last.items() if one.record is not None}

    def _alone(self, job: Job) -> Outcome:
        return squad.crew([job], workers=self.workers, threads=self.threads, progress=quietly)[0]

    def _tamper(self) -> AutoTamper:
        size, errands, home = self.size, self._errands, self.data.home
        return AutoTamper(
            model=self.model,
            baselines=(self.baseline,),
            battery=size.battery,
            adaptive=size.adaptive,
            scale=FineTune(steps=size.attack_steps),
            folder=self.folder / "resistance",
            data=home.data,
            suite=errands.along(home.name),
            dev=None if home.dev is None else errands.along(home.name, split="dev"),
            seed=self.seed,
            fresh_seeds=size.seeds - 1,
            most_steps=size.most_steps,
            looks=size.looks,
            exhaustive=True,
            template=self.template,
            device=self.device,
            max_length=self.max_length,
            shelf=self.shelf,
            workers=self.workers,
            threads=self.threads,
        )

    def _resistance(self, result: Mapping[str, Any]) -> Condition:
        return resistance(result["battery"]["summary"], even(self._breaks(result), AXIS), self.model)

    def _breaks(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        summary = result["battery"]["summary"]
        phi = next((row["phi"] for row in summary["models"] if row["model"] == self.model), PHI)
        return break_rows(result, self.model, self.baseline, metric=summary["metric"], phi=phi)

    def _joined(
        self,
        result: Mapping[str, Any],
        attacks: Sequence[Errand],
        done: Mapping[str, Mapping[str, Any]],
        failed: Mapping[str, str],
    ) -> dict[str, Any]:
        """The battery's result with the attacks on the same domain in it: those were made with every seed.

        A battery repeats only what harmed the hardened model, so one that nothing harms would have a single seed.
        """
        home = [errand.job for errand in attacks if errand.about["domain"] == self.data.home.name]
        titles = {job.title for job in home}
        lost = [job for job in home if job.title in failed]
        return joined(
            result,
            [done[title] for title in done if title in titles],
            [record for title, record in done.items() if title not in titles],
            [
                {"defence": job.defence, "attack": job.name, "seed": job.attack.seed, "error": failed[job.title]}
                for job in lost
            ],
        )

    def _generalisation(
        self, attacks: Sequence[Errand], done: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]
    ) -> Condition:
        rows = []
        for errand in attacks:
            record = done.get(errand.job.title)
            if record is not None and record["curve"]["points"]:
                rows.append({**errand.about, **broke(record["curve"], PHI)})
        rows += list(threats(result, self._breaks(result), self.data.home.name, AXIS))
        if attacks:
            opening, folder = replace(attacks[0].job.opening, source=self.baseline), self.folder / "overlap"
            reader = Reader(baseline=opening, folder=folder, crew=self._alone)
            sets = asked_in(self.data.attacked(self.size), self._errands.suite)
            return generalisation(rows, self._trained_on(), duplicates=duplicates(hardened(self.model), sets, reader))
        return generalisation(rows, self._trained_on())

    def _trained_on(self) -> list[str]:
        return list(self.data.trained_on)
