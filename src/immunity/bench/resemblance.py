"""Resemblance: which prompts that attack or measure the baseline reads as nearly the same as one of the defence's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from immunity.attacks.attack import Opening
from immunity.bench import overlaps
from immunity.bench.ground import Domain
from immunity.bench.hardened import Hardened
from immunity.bench.jobs import Job
from immunity.bench.keeping import Tell, finished
from immunity.bench.overlaps import Asked, Row, Trained
from immunity.bench.prints import fingerprint, prompt_text
from immunity.bench.worker import Outcome
from immunity.data.duplicates import distinct
from immunity.measure import likeness
from immunity.measure.suite import Suite

EMBEDDING: Final = "embedding"
_LOST: Final = "the texts cannot be made or read again"
MOST: Final = 2048
"""Prompts of the defence that are looked at, at most; of more, some drawn by hash. About a minute for a small model."""


@dataclass(frozen=True, kw_only=True)
class Resemblance(Job):
    """Read the prompts of both sides with the model that the defence began with.

    Attributes:
        name: As a person should read it.
        baseline: That model's files.
        declined: Distinct prompts that the defence may have learnt to turn down.
        answered: All its others.
        of: How many distinct ones there are of both kinds, kept or not.
        sets: What they are compared with.
        folder: Where the record goes.
    """

    name: str
    baseline: Opening
    declined: tuple[str, ...]
    answered: tuple[str, ...]
    of: int
    sets: tuple[Asked, ...]
    folder: Path
    kind: ClassVar[str] = "resemblance"

    @property
    def title(self) -> str:
        """The job in one line."""
        return f"read the prompts of {self.name}"

    @property
    def steps(self) -> int:
        """The defence's prompts, and each set."""
        return 1 + len(self.sets)

    @property
    def measured_at(self) -> frozenset[int]:
        """None: it does nothing else."""
        return frozenset()

    def identity(self) -> dict[str, Any]:
        """See :meth:`Hardening.identity`."""
        texts = json.dumps([self.answered, self.declined, self.of])
        return {
            "model": {**asdict(self.baseline), "weights": fingerprint(self.baseline.source)},
            "defence": hashlib.sha256(texts.encode()).hexdigest()[:16],
            "sets": {one.name: [one.corpus.fingerprint, one.answered] for one in self.sets},
            "quantile": likeness.QUANTILE,
        }

    def work(self, tell: Tell) -> dict[str, Any]:
        """See :meth:`Job.work`."""
        tell(0, {})
        embed = partial(likeness.embedded, self.baseline.load("merged"))
        texts = (*self.answered, *self.declined)
        known = likeness.likeness(embed, texts)
        tell(1, {})
        counts = {}
        for i, one in enumerate(self.sets, 2):
            among = range(len(self.answered)) if one.answered else None
            near = known.nearest(embed(list(one.texts.values())), among)
            counts[one.name] = [sum(value > known.threshold for value in near), len(near)]
            tell(i, {})
        about = {
            "threshold": known.threshold,
            "prompts": len(texts),
            "of": self.of,
            "found": known.found,
            "made": known.made,
            "calibrated": known.calibrated,
        }
        return finished(
            self.folder, {"kind": self.kind, "identity": self.identity(), "likeness": about, "counts": counts}
        )


def asked_in(domains: Sequence[Domain], suite: Callable[[str], Suite]) -> list[Asked]:
    """What measures and attacks in several domains, each set once.

    Args:
        domains: The audited one first.
        suite: The name of a domain -> what is measured of it.
    """
    every = [one for i, d in enumerate(domains) for one in overlaps.asked(suite(d.name), d.data, d.name if i else "")]
    return list({one.name: one for one in reversed(every)}.values())[::-1]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How prompts are read.

    Attributes:
        baseline: Where the defence began.
        folder: Where the job goes.
        crew: Does it.
    """

    baseline: Opening
    folder: Path
    crew: Callable[[Job], Outcome]


def duplicates(model: Hardened, sets: Sequence[Asked], reader: Reader) -> list[Row]:
    """What a defence was trained on of each set: by words, by shingles, and by what the baseline makes of them.

    Args:
        model: The hardened model; nothing is said without a record.
        sets: What attacks and measures.
        reader: Of prompts.
    """
    known = overlaps.trained(model) if sets else []
    return [*overlaps.rows(model, sets), *(_by_embedding(model, known, sets, reader) if known else ())]


def _by_embedding(model: Hardened, known: Sequence[Trained], sets: Sequence[Asked], reader: Reader) -> Iterator[Row]:
    texts, lost = _texts(known)
    shown = distinct(texts)
    chosen = sorted(shown, key=lambda text: hashlib.sha256(text.encode(errors="replace")).digest())[:MOST]
    record: Mapping[str, Any] | None = None
    failed = f"of the defence's data {_LOST}"
    if len(chosen) > 1:
        job = Resemblance(
            name=model.model,
            baseline=reader.baseline,
            answered=tuple(text for text in chosen if not texts[text]),
            declined=tuple(text for text in chosen if texts[text]),
            of=len(shown),
            sets=tuple(sets),
            folder=reader.folder,
        )
        outcome = reader.crew(job)
        record, failed = outcome.record, outcome.error
    for one in sets:
        why = overlaps.not_compared([lost[t.name] for t in overlaps.relevant(known, one) if t.name in lost])
        if record is None:
            yield overlaps.row(model, one, EMBEDDING, 0, len(one.texts), why=why or failed, decides=False)
            continue
        about, (shared, of) = record["likeness"], record["counts"][one.name]
        scaled = min(of, math.ceil(shared * about["of"] / about["prompts"]))
        decides = about["calibrated"] and (scaled > 0 or not why)
        yield overlaps.row(model, one, EMBEDDING, scaled, of, why=why, note=_told(about), decides=decides)


def _texts(known: Sequence[Trained]) -> tuple[dict[str, bool], dict[str, str]]:
    """Prompt -> whether it is only ever declined, the others first; name of a corpus -> why it has no texts."""
    texts: dict[str, bool] = {}
    lost: dict[str, str] = {}
    for one in sorted(known, key=lambda t: t.declined):
        corpus = overlaps.rebuilt(one.row) if one.prints is not None else None
        if corpus is None:
            lost[one.name] = f"{one.name}: {_LOST}"
            continue
        for text in map(prompt_text, corpus):
            texts.setdefault(text, one.declined)
    return texts, lost


def _told(about: Mapping[str, Any]) -> str:
    """How far the count is to be believed."""
    some = "" if about["prompts"] == about["of"] else f" drawn from {about['of']}, so the count is scaled up"
    told = (
        f"cosine above {about['threshold']:.4f}, the {likeness.QUANTILE} quantile of the nearest other one among "
        f"{about['prompts']} prompts{some}; it finds {about['found']:.0%} of {about['made']} made duplicates"
    )
    return told if about["calibrated"] else f"{told}, so it decides nothing"
