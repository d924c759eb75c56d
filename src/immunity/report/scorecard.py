"""The scorecard of an audit as text: plain for a terminal, Markdown for a model's card."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from immunity.report.audit_judges import judged
from immunity.report.audit_overlaps import TITLE, summed
from immunity.report.audit_words import CONDITIONS, SEEN, VERDICTS, ClaimRow, claim_row, verdict_of
from immunity.report.clean import cleaned, visible
from immunity.report.show import duration

WIDTH: Final = 80
"""Columns of the plain scorecard."""

FACTS: Final = ("command", "created", "seconds", "versions")
"""What a result says of how it was made."""

_MARKUP: Final = re.compile(r"[\\`*_\[\]#|~$]|^[-+]|^\d+(?=[.)])|(?<=\bwww)\.|:(?=//)|@")
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINKED: Final = frozenset("@:.")
"""What becomes a link, or calls somebody, also with a backslash before it."""

Row = Mapping[str, Any]


def whole(result: Row) -> dict[str, Any]:
    """The audit of a result, with what the result says of how it was made under "provenance"."""
    audit = dict(result.get("audit") or {})
    known = {key: result[key] for key in FACTS if result.get(key) is not None}
    return {**audit, "provenance": {**known, **(audit.get("provenance") or {})}}


def sentence(audit: Row) -> str:
    """The four verdicts, counted: "1 of 4 conditions passes, 1 fails, 2 have not enough evidence."."""
    found = [verdict_of(row) for row in conditions(audit).values()]
    passed, failed = found.count("pass"), found.count("fail")
    some = len(found) - passed - failed
    said = [f"{passed or 'None'} of the {len(found)} conditions pass{'es' if passed < 2 else ''}"]
    said += [f"{failed} fail{'s' if failed == 1 else ''}"] if failed else []
    said += [f"for {some} there is not enough evidence"] if some else []
    return ", ".join(said) + "."


def conditions(audit: Row) -> dict[str, Row]:
    """Name -> condition, all four; one that the audit lacks has no verdict and no claims."""
    given = {str(row.get("name")): row for row in audit.get("conditions") or ()}
    return {
        name: given.get(name) or {"name": name, "says": f"{name.capitalize()} was not measured."} for name in CONDITIONS
    }


def claims(condition: Row) -> list[ClaimRow]:
    """The claims of a condition, what decides first."""
    name = str(condition.get("name"))
    rows = [claim_row(name, claim) for claim in condition.get("claims") or ()]
    return sorted(rows, key=lambda row: list(VERDICTS).index(row.verdict))


def text(audit: Row) -> str:
    """The scorecard in at most 80 columns, without colours.

    Args:
        audit: ``result["audit"]``, or what :func:`whole` makes of a result: that says how it was made, too.
    """
    card = cast("dict[str, Any]", cleaned(audit))
    lines = [_ruled(f"IMMUNITY AUDIT, {_tier(card)}"), *_wrapped(f"model     {_plain(card.get('model'))}", 10)]
    lines += _wrapped(f"baseline  {_plain(card.get('baseline'))}", 10)
    lines += ["", *(f"  {name.capitalize():<15} {verdict_of(row).upper()}" for name, row in conditions(card).items())]
    lines += ["", *_wrapped(sentence(card))]
    for name, row in conditions(card).items():
        verdict = verdict_of(row)
        lines += ["", _ruled(name.upper(), f"[{verdict.upper()}]"), *_wrapped(_plain(row.get("says")))]
        for claim in claims(row):
            lines += _claim(claim)
    for title, key in (("THIS BUDGET CAN SHOW", "supports"), ("IT CANNOT SHOW", "cannot")):
        if card.get(key):
            lines += ["", _ruled(title), *(line for one in card[key] for line in _wrapped(f"- {_plain(one)}", 2))]
    shared = list(summed(conditions(card)["generalisation"]))
    lines += ["", *_wrapped(f"{TITLE}:")] if shared else []
    lines += [line for one in shared for line in _wrapped(f"- {_plain(one)}", 2)]
    lines += ["", *_wrapped(SEEN)]
    facts = list(_facts(card))
    lines += ["", *(line for fact in facts for line in _wrapped(": ".join(fact), 2))] if facts else []
    return "\n".join(lines) + "\n"


def markdown(audit: Row, *, level: int = 2) -> str:
    """The scorecard for a model's card.

    Args:
        audit: As for :func:`text`.
        level: Of its heading.
    """
    card = cast("dict[str, Any]", cleaned(audit))
    rows = conditions(card)
    parts = [f"{'#' * level} Immunity audit, {_said(_tier(card))}", _said(sentence(card))]
    parts.append(f"Model: {_said(card.get('model'))}  \nBaseline, before hardening: {_said(card.get('baseline'))}")
    table = [
        f"| {name.capitalize()} | {VERDICTS[verdict_of(row)][1]} **{verdict_of(row)}** | {_said(row.get('says'))} |"
        for name, row in rows.items()
    ]
    parts.append("\n".join(["| Condition | Verdict | |", "|---|---|---|", *table]))
    lines = [_cells(name, claim) for name, row in rows.items() for claim in claims(row)]
    if lines:
        head = [
            "| Condition | Claim | Value [interval] | Limit | MDE | Behind it | Verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        parts.append("\n".join([*head, *lines]))
    for title, key in (("What this budget can show:", "supports"), ("What it cannot show:", "cannot")):
        if card.get(key):
            parts.append("\n".join([title, "", *(f"- {_said(one)}" for one in card[key])]))
    if shared := list(summed(rows["generalisation"])):
        parts.append("\n".join([f"{TITLE}:", "", *(f"- {_said(one)}" for one in shared)]))
    parts.append(_said(SEEN))
    command = (card.get("provenance") or {}).get("command")
    if command:
        parts.append(_code(_plain(command)))
    facts = [f"- {_said(name)}: {_said(value)}" for name, value in _facts(card) if name != "command"]
    return "\n\n".join([*parts, *(["\n".join(facts)] if facts else [])]) + "\n"


def _claim(claim: ClaimRow) -> Iterator[str]:
    """Two or three lines of a claim."""
    yield from _wrapped(f"  {claim.sign} {_plain(claim.name)}: {_told(claim)}", 4)
    more = [claim.bounds] if claim.bounds else []
    yield from _wrapped("    " + " · ".join([*more, claim.verdict]), 4)


def _cells(name: str, claim: ClaimRow) -> str:
    """The row of a claim in a table."""
    row = (name, _said(claim.name), _told(claim), claim.limit, claim.mde, claim.of, claim.verdict)
    return f"| {' | '.join(row)} |"


def _told(claim: ClaimRow) -> str:
    return f"{claim.value}{f' [{claim.interval}]' if claim.interval else ''}"


def _tier(card: Row) -> str:
    return f"tier {_plain(card.get('tier'))}"


def _facts(card: Row) -> Iterator[tuple[str, str]]:
    """What made it, in pairs."""
    if card.get("domain"):
        yield "restricted stand-in", _plain(card["domain"])
    for judge in judged(card):
        yield f"{judge.role or 'a'} judge", f"{_plain(judge.name)}, {_plain(judge.says)} ({_plain(judge.source)})"
    known = card.get("provenance") or {}
    for key, value in known.items():
        if key == "seconds":
            yield "took", duration(value)
        elif key == "versions" and isinstance(value, Mapping):
            yield "versions", ", ".join(f"{_plain(name)} {_plain(one)}" for name, one in value.items())
        elif isinstance(value, str | int | float):
            yield _plain(key), _plain(value)
        elif isinstance(value, Sequence) and all(isinstance(one, str | int | float) for one in value):
            yield _plain(key), ", ".join(map(_plain, value))


def _plain(value: object) -> str:
    """On one line, with what would move the cursor or reorder text spelt out."""
    return " ".join(visible("unknown" if value is None else str(value)).split())


def _said(value: object) -> str:
    """Text in Markdown, as text: nothing in it is markup, wherever it stands."""
    escaped = "".join(_ENTITIES.get(char, char) for char in _plain(value))
    return _MARKUP.sub(_escaped, escaped)


def _escaped(found: re.Match[str]) -> str:
    text = found[0]
    if text in _LINKED:
        return f"&#{ord(text)};"
    return f"&#{ord(text[0])};{text[1:]}" if text[0].isdigit() else f"\\{text}"


def _code(command: str) -> str:
    """A fenced block whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    return f"{fence}\n{command}\n{fence}"


def _wrapped(line: str, indent: int = 0) -> list[str]:
    start = len(line) - len(line.lstrip())
    return textwrap.wrap(
        line.lstrip(), WIDTH, initial_indent=" " * start, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _ruled(left: str, right: str = "") -> str:
    room = WIDTH - len(left) - len(right) - (2 if right else 1)
    return f"{left} {'-' * max(0, room)}{f' {right}' if right else ''}"[:WIDTH]
