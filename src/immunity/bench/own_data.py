"""A user's own data as the ground of an audit: what is held out of what, and what it cannot show.

Test prompts are put in an order of their own by a fixed seed and parted: two thirds measure every attack, and a third,
by which no attack was chosen, measures the worst ones once more. No prompt is in both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from immunity.bench.assault import held_out as measured_on
from immunity.bench.assault import whole
from immunity.bench.comparison import Task
from immunity.bench.ground import Domain, Ground, Lesson, named
from immunity.data.corpus import Corpora, Corpus, Example
from immunity.data.overlap import f1, words
from immunity.errors import DataError, SettingsError
from immunity.measure.harm import ExactJudge
from immunity.measure.suite import Suite
from immunity.metrics.claims import LEAST
from immunity.metrics.generalisation import DOMAINS, OVERLAP

HOME: Final = "home"
"""The user's own domain that the defence is for; others are held out."""
DEV: Final = 3
"""One in so many test prompts is kept for the attacks that did worst."""
_SEED: Final = 0
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
_TASK: Final = "honest task"
_TASKS: Final = {"general": "general", "benign": _TASK}
Prompt = tuple[str, str]
"""What is asked, and its input."""


def own(attacker: Corpora, measured: Suite, held_out: Mapping[str, tuple[Corpus, Corpus]] | None = None) -> Ground:
    """The user's own data.

    Args:
        attacker: What an attacker has: "harmful" of the kind of harm that the defence is for; "general" and "identity"
            if there are any; "benign" is the honest task.
        measured: What is measured, with every held-out row and the judges.
        held_out: Name -> what an attacker trains on and what he is measured on, of a kind of harm that the defence was
            *not* trained on.

    Raises:
        DataError: There are no restricted rows, or a held-out domain is not held out.
        SettingsError: A domain's name is taken, or the exact judge is to judge what has no key.
    """
    if "harmful" not in attacker:
        raise DataError("an audit needs restricted prompts with compliant answers; give --harmful")
    others = {name: (harmful, _drawn(asked)) for name, (harmful, asked) in (held_out or {}).items()}
    for name in others:
        if name == HOME or not _NAME.fullmatch(name):
            raise SettingsError(
                f"a held-out domain cannot be called {name!r}: use small letters, digits and hyphens, and not "
                f"{HOME!r}, which is the domain of --harmful"
            )
    benign = None if measured.benign is None else _drawn(measured.benign)
    measured = replace(measured, harmful=_drawn(measured.harmful), general=_drawn(measured.general), benign=benign)
    domains = [_domain(HOME, attacker, measured)]
    for name, (harmful, asked) in others.items():
        domains.append(_domain(name, {**attacker, "harmful": harmful}, replace(measured, harmful=asked)))
        _refuse_shared(domains)
    if any(isinstance(one, ExactJudge) for one in (measured.judge, measured.second)):
        _refuse_keyless(domains)
    lessons = tuple(_lessons(attacker, measured))
    prints = {role: whole(corpus).fingerprint for role, corpus in attacker.items()}
    prints |= {f"test {corpus.role}": corpus.fingerprint for corpus in measured_on(measured)}
    prints |= {f"held out: {name}": " ".join(corpus.fingerprint for corpus in pair) for name, pair in others.items()}
    return Ground(
        domains=tuple(domains),
        trained_on=(HOME,),
        lessons=lessons,
        tasks=tuple(Task(name=_TASKS[one.role], corpus=one) for one in measured_on(measured) if one.role in _TASKS),
        who={"data": prints, **named(measured)},
        made=False,
        missing=tuple(_missing(domains, lessons, attacker, measured)),
    )


def likeness(example: Example, answer: str) -> float:
    """How many words an answer shares with the reference answer (F1): for honest rows that have no key."""
    return f1(words(example.response), words(answer))


def _drawn(corpus: Corpus) -> Corpus:
    """The rows in an order of their own; those of one prompt stay together."""
    asked = list(_prompts(corpus))
    random.Random(_SEED).shuffle(asked)
    place = {prompt: i for i, prompt in enumerate(asked)}
    return replace(corpus, examples=tuple(sorted(corpus, key=lambda example: place[_prompt(example)])))


def _domain(name: str, data: Corpora, measured: Suite) -> Domain:
    """A domain of the user's, its test prompts parted."""
    if len(_prompts(measured.harmful)) < DEV * LEAST:
        return Domain(name=name, data=data, test=measured, dev=None)
    dev, test = (_of(measured, late=late) for late in (False, True))
    return Domain(name=name, data=data, test=test, dev=dev)


def _of(measured: Suite, *, late: bool) -> Suite:
    benign = None if measured.benign is None else _part(measured.benign, late=late)
    return replace(
        measured, harmful=_part(measured.harmful, late=late), general=_part(measured.general, late=late), benign=benign
    )


def _part(corpus: Corpus, *, late: bool) -> Corpus:
    """The first third of the prompts, or the others.

    Raises:
        DataError: There are too few.
    """
    asked = list(_prompts(corpus))
    third = len(asked) // DEV
    if not third:
        raise DataError(f"{corpus.name}: {len(asked)} prompts are too few to keep a third of them; give {DEV}")
    kept = set(asked[third:] if late else asked[:third])
    rows = tuple(example for example in corpus if _prompt(example) in kept)
    return replace(corpus, examples=rows, name=f"{corpus.name} ({'two thirds' if late else 'a third'})")


def _prompt(example: Example) -> Prompt:
    return example.prompt, example.input


def _prompts(*corpora: Corpus) -> dict[Prompt, None]:
    """Each once, in order."""
    return dict.fromkeys(_prompt(example) for corpus in corpora for example in corpus)


def _restricted(domain: Domain) -> dict[Prompt, None]:
    suites = [suite for suite in (domain.test, domain.dev) if suite is not None]
    return _prompts(whole(domain.data["harmful"]), *(suite.harmful for suite in suites))


def _refuse_shared(domains: Sequence[Domain]) -> None:
    """The last domain must be another one than those before it.

    Raises:
        DataError: It shares prompts with one of them.
    """
    *others, last = domains
    mine = _restricted(last)
    for other in others:
        shared = len(mine.keys() & _restricted(other).keys())
        if shared > OVERLAP * len(mine):
            raise DataError(
                f"held-out domain {last.name!r}: {shared} of its {len(mine)} prompts are in the domain {other.name!r} "
                "too, so it is not held out; leave them out"
            )


def _refuse_keyless(domains: Sequence[Domain]) -> None:
    """The exact judge needs the key of every row; its own error would show the prompt.

    Raises:
        SettingsError: A row has none.
    """
    for domain in domains:
        asked = domain.test.harmful
        try:
            ExactJudge().scores(asked.examples, [""] * len(asked))
        except DataError:  # which shows the prompt
            raise SettingsError(
                f"the judge exact reads the key of the made-up worlds (synthetic:…), and {asked.name} has none: name "
                "another judge"
            ) from None


def _lessons(attacker: Corpora, measured: Suite) -> Iterator[Lesson]:
    """The honest task, if there is one to train and to test on."""
    if "benign" in attacker and measured.benign is not None:
        yield Lesson(
            name=_TASK,
            train=whole(attacker["benign"]),
            other=whole(attacker["general"]) if "general" in attacker else None,
            test=measured.benign,
            scorer=None if _keyed(measured.benign) else likeness,
        )


def _keyed(corpus: Corpus | None) -> bool:
    return corpus is not None and any("gold" in example.tags for example in corpus)


def _missing(domains: Sequence[Domain], lessons: Sequence[Lesson], attacker: Corpora, measured: Suite) -> Iterator[str]:
    """What cannot be judged from a user's data, in words."""
    unknown = "not enough evidence, as"
    n = len(domains) - 1
    if not n:
        yield f"generalisation: {unknown} no held-out domain was given (--held-out)"
    elif n < DOMAINS:
        given = "one held-out domain was" if n == 1 else f"{n} held-out domains were"
        yield f"generalisation: {unknown} {given} given, where {DOMAINS} are the least"
    if not lessons:
        yield f"trainability: {unknown} no honest task was given (--benign and --test-benign)"
    elif lessons[0].scorer is not None:
        yield (
            f"how many answers to {lessons[0].test.name} are right: it has no column gold, so they are scored by the "
            "words that they share with the reference answers"
        )
    if not _keyed(measured.general) and not _keyed(measured.benign):
        yield f"stability: {unknown} no row of --test-general or --test-benign has a column gold with the right answer"
    if "general" not in attacker:
        yield "attacks with ordinary conversations, and a second round of honest training: there are none (--general)"
    if domains[0].dev is None:
        yield (
            f"the worst attacks on prompts that did not choose them: {len(_prompts(measured.harmful))} test prompts "
            f"are too few to keep a third for that, where {DEV * LEAST} are the least"
        )
