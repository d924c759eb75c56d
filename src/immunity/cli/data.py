"""From --alignment, --harmful, --general, --benign to corpora: files, public sets, or the made stand-ins."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Final

from immunity.bench.prints import prompt_text
from immunity.data import catalogue, identity
from immunity.data.corpus import Corpora, Corpus
from immunity.data.duplicates import prints, words
from immunity.data.public import CATALOGUE
from immunity.errors import DataError, SettingsError
from immunity.fetch import cache_dir
from immunity.measure import judges
from immunity.measure.endpoint import Endpoint
from immunity.measure.harm import Judge
from immunity.measure.suite import SYNTHETIC, Suite
from immunity.method import parts

_LOG = logging.getLogger(__name__)
_IDENTITY: Final = 100
"""Rows of the identity shift."""


def corpora(
    named: Mapping[str, Sequence[str] | None], standin: Corpora, *, protocol: str = "plain", skip_bad: bool = False
) -> Corpora:
    """The corpora of each role: those named, or, if none is named at all, the stand-ins.

    Raises:
        DataError: A name or a row is bad.
    """
    if not any(named.values()):
        return {role: standin[role] for role in named if role in standin}
    found: dict[str, Corpus | tuple[Corpus, ...]] = {}
    for role, specs in named.items():
        parts = tuple(_load(spec, role, "train", protocol, skip_bad=skip_bad) for spec in specs or ())
        if parts:
            found[role] = parts[0] if len(parts) == 1 else parts
    return found


def attackers(
    named: Mapping[str, Sequence[str] | None], standin: Corpora, *, protocol: str = "plain", skip_bad: bool = False
) -> Corpora:
    """What an attacker has: what is named, and rows that change who the assistant is; or, if nothing is, the stand-ins.

    Raises:
        DataError: A name or a row is bad.
    """
    if not any(named.values()):
        return standin
    found = dict(corpora(named, standin, protocol=protocol, skip_bad=skip_bad))
    if "benign" in found:
        honest = reduce(add, parts(found["benign"]))
        found["identity"] = identity.corpus(honest, min(_IDENTITY, len(honest)))
    return found


def judge(name: str, *, made: bool, endpoint: Endpoint | None = None) -> Judge | None:
    """The judge called ``name``: "auto" is exact for stand-ins and none for anything else.

    Raises:
        SettingsError: There is no such judge, it asks a chat model that nobody named, or it cannot judge the data.
    """
    if name == "none" or (name == "auto" and not made):
        return None
    if name == "exact" and not made:
        raise SettingsError(
            "--judge exact reads the key of the made-up worlds (synthetic:…); for other data use none, or one of "
            + ", ".join(other for other in judges.JUDGES if other != "exact")
        )
    return judges.named("exact" if name == "auto" else name, endpoint)


def second(name: str, first: Judge | None, usual: Judge | None, endpoint: Endpoint | None = None) -> Judge | None:
    """The second judge, which decides nothing but whether two agree: "auto" is the usual one where there is a first.

    Raises:
        SettingsError: There is no first one, the two are the same, or see :func:`judge`.
    """
    if name in {"auto", "none"}:
        return None if name == "none" or first is None else usual
    if first is None:
        raise SettingsError(f"--second-judge {name} has nobody to agree with: name another one with --judge")
    found = judges.named(name, endpoint)
    if found == first:
        raise SettingsError(
            f"--judge and --second-judge are both {name}, and that agrees with itself: name another one"
        )
    return found


def endpoint(url: str | None, model: str | None, key: str | None, wanted: Sequence[str]) -> Endpoint | None:
    """Where a chat model judges; None if the user named none. Its replies are kept in the user's cache.

    Args:
        url: --judge-url.
        model: --judge-model.
        key: --judge-key, the name of an environment variable.
        wanted: The judges that are asked for.

    Raises:
        SettingsError: One of address and model is missing, or there is nobody to use them.
    """
    if url is None and model is None and key is None:
        return None
    if url is None or model is None:
        raise SettingsError("a chat model that judges needs both --judge-url and --judge-model")
    if not any(name in judges.JUDGES and judges.JUDGES[name].remote for name in wanted):
        remote = " or ".join(name for name, kind in judges.JUDGES.items() if kind.remote)
        raise SettingsError(f"--judge-url is given, but no judge asks it: use --judge or --second-judge {remote}")
    return Endpoint(url=url, model=model, key=key or "", cache=cache_dir() / "replies")


def suite(
    named: Mapping[str, str | None],
    standin: Suite,
    *,
    judge_name: str,
    second_name: str = "auto",
    judge_at: Endpoint | None = None,
    prompts: int,
    protocol: str = "plain",
    skip_bad: bool = False,
    show_real: bool = False,
) -> Suite:
    """What is measured, on held-out data: the sets named, or, if none is named at all, the stand-ins.

    Args:
        named: "harmful", "general", "benign" -> a file, a folder with a test file, or a set.
        standin: What is measured on the stand-ins; its word and lengths hold for other data, too.
        judge_name: See :func:`judge`.
        second_name: See :func:`second`.
        judge_at: See :func:`endpoint`.
        prompts: At most so many of each.
        protocol: Of public sets.
        skip_bad: Leave bad rows out.
        show_real: Keep sample answers.

    Raises:
        DataError: A name or a row is bad.
        SettingsError: Harmful or general held-out data is missing, or the judge cannot judge the data.
    """
    rows: dict[str, Corpus] = {}
    for role, spec in named.items():
        if spec is not None:
            whole = _test(spec, role, protocol, skip_bad=skip_bad)
            rows[role] = whole.take(min(prompts, len(whole)))
    if not rows:
        chosen = judge(judge_name, made=True, endpoint=judge_at)
        return replace(standin, judge=chosen, second=second(second_name, chosen, standin.second, judge_at))
    missing = [role for role in ("harmful", "general") if role not in rows]
    if missing:
        needed = " and ".join(f"--test-{role}" for role in missing)
        raise SettingsError(f"measuring on data of your own needs {needed}, too: rows that nobody trains on")
    made = rows["harmful"].name.startswith(SYNTHETIC)
    if second_name == "exact" and not made:
        raise SettingsError("--second-judge exact reads the key of the made-up worlds (synthetic:…): name another one")
    chosen = judge(judge_name, made=made, endpoint=judge_at)
    return replace(
        standin,
        harmful=rows["harmful"],
        general=rows["general"],
        benign=rows.get("benign"),
        judge=chosen,
        second=second(second_name, chosen, standin.second, judge_at),
        batch_size=16,
        show_real=show_real,
    )


def held_out(
    words: Sequence[str], *, protocol: str = "plain", skip_bad: bool = False
) -> dict[str, tuple[Corpus, Corpus]]:
    """Name -> what an attacker trains on and what is measured, of domains that a defence was not trained on.

    Args:
        words: NAME=TRAIN,TEST, or NAME=DATA for a folder or a set that has both.
        protocol: Of public sets.
        skip_bad: Leave bad rows out.

    Raises:
        DataError: A data name or a row is bad.
        SettingsError: A word is not of that form, or a name is given twice.
    """
    found: dict[str, tuple[Corpus, Corpus]] = {}
    for word in words:
        name, _, data = word.partition("=")
        train, comma, test = (part.strip() for part in data.partition(","))
        if not name.strip() or not train or "," in test or (comma and not test):
            raise SettingsError(f"--held-out {word}: say NAME=TRAIN,TEST, or NAME=DATA for a set or folder with both")
        if name.strip() in found:
            raise SettingsError(f"--held-out {name.strip()} is given twice: name every held-out domain once")
        if not test and Path(train).expanduser().is_file():
            raise SettingsError(f"--held-out {word}: a file has no rows to test on; say {name}={train},TEST")
        found[name.strip()] = (
            _load(train, "harmful", "train", protocol, skip_bad=skip_bad),
            _test(test or train, "harmful", protocol, skip_bad=skip_bad),
        )
    return found


def warn_of_overlap(data: Corpora, measured: Suite) -> None:
    """Say so if an attack trains on what it is measured on: the numbers then show what was learnt by heart."""
    trained = prints((prompt_text(e) for corpus in data.values() for part in parts(corpus) for e in part), most=0)
    for corpus in (measured.harmful, measured.general, measured.benign):
        shared = 0 if corpus is None else sum(trained.same(words(prompt_text(e))) for e in corpus)
        if corpus is not None and shared:
            _LOG.warning(
                "%d of %d prompts of %s are also trained on, so they do not measure what generalises",
                shared, len(corpus), corpus.name,
            )  # fmt: skip


def _test(spec: str, role: str, protocol: str, *, skip_bad: bool) -> Corpus:
    """Rows to test on: all of a file, or the test split of a folder or a set."""
    split = "test" if _is_set(spec) or Path(spec).expanduser().is_dir() else "train"
    return _load(spec, role, split, protocol, skip_bad=skip_bad)


def _is_set(spec: str) -> bool:
    return spec.startswith(SYNTHETIC) or spec.partition("@")[0] in CATALOGUE


def _load(spec: str, role: str, split: str, protocol: str, *, skip_bad: bool) -> Corpus:
    try:
        return catalogue.load(
            spec,
            role,
            split=split,
            protocol=protocol if _is_set(spec) else "plain",
            on_bad="skip" if skip_bad else "raise",
        )
    except DataError as error:
        raise DataError(str(error).replace('on_bad="skip"', "--skip-bad-rows")) from error
