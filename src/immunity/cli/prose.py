"""Docstrings as text for people: their sections, what they say of a setting, how a method departs from its paper."""

from __future__ import annotations

import inspect
import re
from typing import Final

_HEAD: Final = re.compile(r"([A-Z][\w ]*):")
NONE_KNOWN: Final = "None known"
"""How a docstring says that there is no departure."""


def sections(kind: object) -> dict[str, str]:
    """Title -> text of each section of a docstring ("Attributes", "Raises" …); what stands before them under ""."""
    found: dict[str, list[str]] = {"": []}
    last = ""
    for line in (inspect.getdoc(kind) or "").splitlines():
        head = _HEAD.fullmatch(line)
        if head:
            last = head[1]
            found[last] = []
        else:
            found[last].append(line)
    return {title: inspect.cleandoc("\n".join(["", *text])).strip() for title, text in found.items()}


def attributes(kind: object) -> dict[str, str]:
    """Setting -> what its class's docstring says of it under "Attributes", with the docstring's marks."""
    found: dict[str, str] = {}
    last = ""
    for line in sections(kind).get("Attributes", "").splitlines():
        start = re.match(r"(\w+): (.*)", line)
        if start:
            last = start[1]
            found[last] = start[2]
        elif last and line.strip():
            found[last] += f" {line.strip()}"
    return found


def described(kind: object) -> dict[str, str]:
    """:func:`attributes`, in plain text."""
    return {name: plain(text) for name, text in attributes(kind).items()}


def departures(kind: object) -> tuple[str, ...]:
    """What a method's docstring lists under "Departures from the paper"; () if none is known."""
    text = sections(kind).get("Departures from the paper", "")
    if text.startswith(NONE_KNOWN):
        return ()
    points = re.split(r"(?m)^[*-] ", text) if re.match(r"[*-] ", text) else [text]
    return tuple(" ".join(point.split()) for point in points if point.strip())


def plain(text: str) -> str:
    """Without the marks of a docstring: :meth:`x`, ``x`` and *x* all become x."""
    return re.sub(r":\w+:`~?([^`]*)`|\*(\w[^*]*)\*", r"\1\2", text).replace("``", "")


def shown(value: object) -> str:
    """A setting's value, as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
