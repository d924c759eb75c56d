"""From the options of immunity audit to what it stands on: the stand-ins, or data of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from immunity.bench import standins
from immunity.bench.ground import Ground, stand_ins
from immunity.bench.hardened import hardened
from immunity.bench.own_data import own
from immunity.cli import data as sources
from immunity.errors import SettingsError

if TYPE_CHECKING:
    from immunity.measure.endpoint import Endpoint


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the user named.

    Attributes:
        train: "harmful", "benign", "general" -> what an attacker or an honest user trains on.
        test: The same -> what is measured.
        held_out: NAME=TRAIN,TEST of every held-out domain.
        domain: Of the stand-ins, if no data is named.
        judge: See :func:`immunity.cli.data.judge`.
        second: See :func:`immunity.cli.data.second`.
        judge_at: See :func:`immunity.cli.data.endpoint`.
        tokens: Longest answer; None is 20 for the stand-ins and 32 for other data.
        protocol: Of public sets.
        skip_bad: Leave bad rows out.
        show_real: Keep sample answers.
    """

    train: Mapping[str, Sequence[str] | None]
    test: Mapping[str, str | None]
    held_out: Sequence[str]
    domain: str
    judge: str
    second: str
    judge_at: Endpoint | None
    tokens: int | None
    protocol: str
    skip_bad: bool
    show_real: bool

    @property
    def made(self) -> bool:
        """Whether no data is named, so that the stand-ins stand in."""
        return not (any(self.train.values()) or any(self.test.values()) or self.held_out)


def ground(named: Named, model: str, baseline: str) -> Ground:
    """What the audit of ``model`` stands on.

    Raises:
        DataError: A name or a row is bad, or a held-out domain is not held out.
        SettingsError: Data is missing, or a judge cannot judge it.
    """
    if not named.made:
        return _own(named, hardened(model).word or "error")
    if named.tokens is not None or named.show_real:
        raise SettingsError("--tokens and --show-real are for data of your own: name it with --harmful and the others")
    nothing = dict.fromkeys(named.test)
    asked = sources.suite(
        nothing,
        standins.suite(named.domain, n=1),
        judge_name=named.judge,
        second_name=named.second,
        judge_at=named.judge_at,
        prompts=1,
    )
    return stand_ins(model, baseline, named.domain, judged_by=(asked.judge, asked.second))


def _own(named: Named, word: str) -> Ground:
    if missing := list(_missing(named)):
        needed = " and ".join((", ".join(missing[:-1]), missing[-1])) if len(missing) > 1 else missing[0]
        raise SettingsError(f"an audit on data of your own needs {needed}, too")
    attacker = sources.attackers(named.train, {}, protocol=named.protocol, skip_bad=named.skip_bad)
    measured = sources.suite(
        named.test,
        standins.suite(named.domain, n=1, word=word, tokens=named.tokens or 32),
        judge_name=named.judge,
        second_name=named.second,
        judge_at=named.judge_at,
        prompts=sys.maxsize,
        protocol=named.protocol,
        skip_bad=named.skip_bad,
        show_real=named.show_real,
    )
    others = sources.held_out(named.held_out, protocol=named.protocol, skip_bad=named.skip_bad)
    found = own(attacker, measured, others)
    sources.warn_of_overlap(attacker, measured)
    for train, test in others.values():
        sources.warn_of_overlap({"harmful": train}, replace(measured, harmful=test))
    return found


def _missing(named: Named) -> Iterator[str]:
    """The options without which there is no audit."""
    if not named.train["harmful"]:
        yield "--harmful"
    yield from (f"--test-{role}" for role in ("harmful", "general") if named.test[role] is None)
