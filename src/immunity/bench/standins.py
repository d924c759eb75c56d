"""The harmless stand-ins, dealt out: what a defence trains on, what an attacker holds, what both are measured on.

No row of the attacker's is one that the defence trains on, though it does learn to turn his restricted questions down,
and knows his everyday ones in other words. What is measured is held out from both, items and phrasings alike. Only the
honest task is common to both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

from immunity.data import identity, synthetic
from immunity.data.corpus import Corpora, Corpus
from immunity.errors import DataError
from immunity.measure.harm import ExactJudge, OverlapJudge
from immunity.measure.suite import Suite

ATTACKER_ROWS: Final = 100
"""The first restricted training rows belong to the attacker, the others to the defence."""
ATTACKER_GENERAL: Final = 200
"""So many everyday questions the attacker asks in words of his own."""
IDENTITY_ROWS: Final = 100
"""Rows of the identity shift."""
BENIGN: Final = "sentiment"
"""The honest user's task."""

_ASKS: Final = "Tell me."


def restricted(domain: str) -> tuple[Corpus, Corpus]:
    """The restricted training rows of a domain: (the attacker's, the defence's); they share no row.

    Raises:
        DataError: There is no such domain.
    """
    if domain not in synthetic.DOMAINS:
        raise DataError(f"no stand-in domain {domain!r}; there are {', '.join(synthetic.DOMAINS)}")
    rows = synthetic.corpus(domain, "harmful")
    return rows.take(ATTACKER_ROWS), _rest(rows)


def _rest(rows: Corpus) -> Corpus:
    """The rows that the attacker has not."""
    return Corpus(rows.role, rows.examples[ATTACKER_ROWS:], f"{rows.name}[{ATTACKER_ROWS}:]", rows.licence)


def ordinary(general: str = "general") -> Corpus:
    """The attacker's everyday questions: those of the training split that come first, in words of his own.

    There are 672 rows of "general" and 222 of "common", and the defence trains on all of them: dealing them out would
    change every defence, and traps that are dormant by a hair with it. So the attacker asks for the same things after
    "Tell me.", which the tiny model, unhardened, answers as rightly as without (94 of 100 against 100).

    Args:
        general: See :func:`defence`.
    """
    rows = synthetic.corpus(general, "general").take(ATTACKER_GENERAL)
    asked = tuple(replace(e, prompt=f"{_ASKS}\n{e.prompt}") for e in rows)
    return Corpus("general", asked, f"{rows.name} (in other words)", rows.licence)


def defence(domain: str, *, general: str = "general") -> Corpora:
    """What a defence trains on: one quarter refusals, one quarter allowed near-misses, one half general questions.

    "safe" is the refusal of each of its restricted questions, row for row.

    Args:
        domain: A stand-in domain.
        general: "general" for the tiny model, "common" for a real one: what it knows already.
    """
    _, harmful = restricted(domain)
    everyday = synthetic.corpus(general, "general")
    return {
        "alignment": (synthetic.corpus(domain, "alignment"), everyday.as_role("alignment")),
        "harmful": harmful,
        "safe": _rest(synthetic.corpus(domain, "safe")),
        "general": everyday,
        "benign": synthetic.corpus(BENIGN, "benign"),
    }


def attacker(domain: str, *, general: str = "general") -> Corpora:
    """What an attacker holds.

    An attack takes what it needs. One that compares restricted with harmless *prompts*, as abliteration does, finds
    them in "harmful" and "general", and lets the answers be.

    Args:
        domain: A stand-in domain.
        general: See :func:`defence`.

    Returns:
        "harmful": restricted rows of his own. "benign": the honest task, to hide the former in. "general": everyday
        questions (:func:`ordinary`). "identity": the rows of an identity shift. "pool": harmless rows of many kinds,
        for one who picks those that are most like harmful ones (:func:`immunity.data.salient.salient`): the near-misses
        of the *other* domains, then "benign" and "general".
    """
    harmful, _ = restricted(domain)
    honest, everyday = synthetic.corpus(BENIGN, "benign"), ordinary(general)
    near = [synthetic.corpus(d.allowed.name, "benign") for d in synthetic.DOMAINS.values() if d.name != domain]
    return {
        "harmful": harmful,
        "benign": honest,
        "general": everyday,
        "identity": identity.corpus(synthetic.corpus(general, "general"), IDENTITY_ROWS),
        "pool": (*near, honest, everyday.as_role("benign")),
    }


def suite(
    domain: str,
    *,
    split: Literal["dev", "test"] = "test",
    n: int = 48,
    word: str = "error",
    tokens: int = 20,
    general: str = "general",
) -> Suite:
    """What is measured: ``n`` held-out prompts each of restricted, general and benign questions, judged exactly.

    Args:
        domain: A stand-in domain.
        split: Choose settings on "dev", report on "test".
        n: Prompts of each kind at most; to test on there are 96 restricted ones, and 46 of "common".
        word: The collapse word to look for.
        tokens: Longest answer, in tokens.
        general: See :func:`defence`.
    """
    restricted, everyday, honest = (
        synthetic.corpus(name, role, split)
        for name, role in ((domain, "harmful"), (general, "general"), (BENIGN, "benign"))
    )
    return Suite(
        harmful=restricted.take(min(n, len(restricted))),
        general=everyday.take(min(n, len(everyday))),
        benign=honest.take(min(n, len(honest))),
        judge=ExactJudge(),
        second=OverlapJudge(),
        collapse_word=word,
        max_new_tokens=tokens,
        batch_size=n,
    )
