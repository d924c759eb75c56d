"""Ground: what an audit stands on. Domains of harm, honest tasks, questions for both models; made up, or the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from immunity import classifiers
from immunity.bench import standins
from immunity.bench.assault import whole
from immunity.bench.audited import defended_domains
from immunity.bench.comparison import Task
from immunity.bench.hardened import hardened, ordinary
from immunity.bench.tiers import Tier
from immunity.data import synthetic
from immunity.data.corpus import Corpora, Corpus
from immunity.errors import SettingsError
from immunity.measure import judges
from immunity.measure.accuracy import Scorer
from immunity.measure.harm import Judge
from immunity.measure.suite import Suite

LESSONS: Final = ("sentiment", "topic")
"""Honest tasks of the stand-ins, in the order in which tiers take them."""
_EVERY: Final = 1 << 30
_DECLINED: Final = "I cannot help with that."
_UNJUDGED: Final = (
    "resistance, stability, generalisation: not enough evidence, as no judge says what is harmful (--judge); losses "
    "and refusals are measured"
)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of harm.

    Attributes:
        name: As a person should read it.
        data: What an attacker has.
        test: What is measured, with all the prompts that there are.
        dev: Other prompts; None if there are too few to hold any out.
    """

    name: str
    data: Corpora
    test: Suite
    dev: Suite | None


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An honest task.

    Attributes:
        name: As a person should read it.
        train: Its rows.
        other: What somebody else has trained before, for a second round; None leaves it out.
        test: Held-out rows.
        scorer: How right an answer is, where that is not the row's key.
    """

    name: str
    train: Corpus
    other: Corpus | None
    test: Corpus
    scorer: Scorer | None = None


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What an audit stands on.

    Attributes:
        domains: Kinds of harm, the audited one first; as many are attacked as a tier says.
        trained_on: Names of those that the defence was trained on.
        lessons: Honest tasks; as many are trained as a tier says.
        tasks: What both models are asked beside the audited domain, before anybody attacks either.
        who: What makes two grounds the same one, JSON-plain.
        made: Whether all of it is a harmless stand-in.
        missing: What cannot be judged from it.
    """

    domains: tuple[Domain, ...]
    trained_on: tuple[str, ...]
    lessons: tuple[Lesson, ...]
    tasks: tuple[Task, ...]
    who: Mapping[str, Any]
    made: bool = True
    missing: tuple[str, ...] = field(default=(), compare=False)

    @property
    def home(self) -> Domain:
        """The audited domain."""
        return self.domains[0]

    @property
    def judge(self) -> Judge | None:
        """Who says what is harmful."""
        return self.home.test.judge

    def suite(self, domain: str, n: int, split: Literal["dev", "test"] = "test", *, others: int | None = None) -> Suite:
        """What is measured of a domain: at most ``n`` prompts of each kind, or ``others`` of those not restricted.

        Raises:
            SettingsError: There is no such domain, or it has no such prompts.
        """
        found = next((one for one in self.domains if one.name == domain), None)
        suite = None if found is None else found.test if split == "test" else found.dev
        if suite is None:
            raise SettingsError(f"no {split} prompts of a domain {domain!r}")
        rest = n if others is None else others
        return replace(
            suite,
            harmful=first(suite.harmful, n),
            general=first(suite.general, rest),
            benign=None if suite.benign is None else first(suite.benign, rest),
            batch_size=n if self.made else suite.batch_size,
        )

    def attacked(self, size: Tier) -> tuple[Domain, ...]:
        """The domains that are attacked; without a judge only the audited one, for its losses and refusals."""
        return self.domains[: size.domains if self.judge is not None else 1]

    def fitted(self, size: Tier) -> Tier:
        """A size with no more prompts and domains than there are, to say what its numbers can show."""
        prompts, domains = min(size.prompts, len(self.home.test.harmful)), min(size.domains, len(self.domains))
        return size if self.made else replace(size, prompts=prompts, domains=domains)

    def supports(self, size: Tier) -> list[str]:
        """What the numbers of a size can show; without a judge, nothing of harm."""
        unjudged = "how both models decline, how their losses move, and how they are fine-tuned honestly"
        return [unjudged] if self.judge is None else self.fitted(size).supports()

    def cannot(self, size: Tier) -> list[str]:
        """What cannot be judged, whatever comes out: from this data, and then in this size."""
        known = [_UNJUDGED] if self.judge is None else []
        beyond = [one.name for one in self.domains[size.domains :]]
        if beyond and not self.made and self.judge is not None:
            n = size.domains - 1
            known.append(f"harm in {', '.join(beyond)}: {size.name} attacks {n} held-out domain{'' if n == 1 else 's'}")
        return [*known, *self.missing, *self.fitted(size).cannot()]

    def judged(self) -> list[dict[str, str]]:
        """Who judges: rows of ``judges.described``, with "role", "first" or "second"."""
        both = (("first", self.home.test.judge), ("second", self.home.test.second))
        return [{**judges.described(judge), "role": role} for role, judge in both if judge is not None]

    def facts(self, size: Tier) -> dict[str, str]:
        """What a user's data are, for whoever reads the result; the stand-ins are known by their names."""
        return {} if self.made else {f"data of {one.name}": _fact(one, size.prompts) for one in self.attacked(size)}

    def ask_judges(self, *, keep: bool) -> None:
        """Let every judge judge one refusal in each domain, so that one that cannot is known before hours are spent.

        Args:
            keep: Leave what they have loaded in memory, for who judges in this process.

        Raises:
            DataError: A judge cannot judge a domain.
            ModelError: What it needs cannot be loaded or reached.
        """
        for domain in self.domains:
            for judge in (domain.test.judge, domain.test.second):
                if judge is not None:
                    judge.scores(domain.test.harmful.examples[:1], [_DECLINED])
        if not keep:
            classifiers.free()


def stand_ins(
    model: str, baseline: str, domain: str, *, judged_by: tuple[Judge | None, Judge | None] | None = None
) -> Ground:
    """The harmless stand-ins.

    Args:
        model: The hardened model: its record says which domains it was trained on, and its collapse word.
        baseline: Where the defence began.
        domain: The restricted world that is judged first. The others are held out, unless the defence was trained on
            them, too.
        judged_by: The first judge and the second, None for nobody; by default by the key, and by shared words.

    Raises:
        SettingsError: There is no such domain.
    """
    if domain not in synthetic.DOMAINS:
        raise SettingsError(f"no stand-in domain {domain!r}; there are {', '.join(synthetic.DOMAINS)}")
    general, word = ordinary(model), hardened(model).word or "error"
    usual = standins.suite(domain, n=1, general=general)
    judge, second = judged_by or (usual.judge, usual.second)
    trained_on = tuple(defended_domains(model, baseline, domain))

    def suite(name: str, split: Literal["dev", "test"]) -> Suite:
        made = standins.suite(name, split=split, n=_EVERY, word=word, general=general)
        return replace(made, judge=judge, second=second)

    near = synthetic.DOMAINS[domain].allowed.name
    trained = {name: synthetic.corpus(name, "benign") for name in LESSONS}
    found = Ground(
        domains=tuple(
            Domain(
                name=name,
                data=standins.attacker(name, general=general),
                test=suite(name, "test"),
                dev=suite(name, "dev"),
            )
            for name in dict.fromkeys([domain, *trained_on, *synthetic.DOMAINS])
        ),
        trained_on=trained_on,
        lessons=tuple(
            Lesson(
                name=name,
                train=trained[name],
                other=trained[LESSONS[(i + 1) % len(LESSONS)]],
                test=synthetic.corpus(name, "benign", "test"),
            )
            for i, name in enumerate(LESSONS)
        ),
        tasks=tuple(Task(name=name, corpus=synthetic.corpus(name, "general", "test")) for name in (general, near)),
        who={"domain": domain},
    )
    same = (judge, second) == (usual.judge, usual.second)
    return found if same else replace(found, who={**found.who, **named(found.home.test)})


def _fact(domain: Domain, n: int) -> str:
    rows, asked = whole(domain.data["harmful"]), domain.test.harmful
    said = f"{len(rows)} rows of {rows.name} to attack with, {min(n, len(asked))} of {asked.name} to measure on"
    if domain.dev is None:
        return said
    return f"{said}, and {min(n, len(domain.dev.harmful))} of the others for the worst attacks once more"


def first(corpus: Corpus, n: int) -> Corpus:
    """The first ``n`` rows, or as many as there are."""
    return corpus.take(min(n, len(corpus)))


def named(suite: Suite) -> dict[str, str]:
    """Who judges, as a part of what makes two grounds the same one."""
    return {"judge": repr(suite.judge), "second": repr(suite.second)}
