"""Settings from text: a method or an attack, built from its preset and the user's words. Pydantic lives only here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from immunity.errors import SettingsError

S = TypeVar("S")


def build(preset: S, overrides: Mapping[str, Any]) -> S:
    """The preset with some settings changed, checked against the types of its dataclass.

    Args:
        preset: A frozen dataclass.
        overrides: Setting -> value; text is read as the setting's type ("0.3", "12", "true", "none", "8,4,3").

    Raises:
        SettingsError: There is no such setting, or its value has the wrong type; all of them in one message.
    """
    kind = type(preset)
    settings: dict[str, Any] = asdict(preset)  # type: ignore[call-overload]
    unknown = [name for name in overrides if name not in settings]
    if unknown:
        known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        raise SettingsError(
            f"{kind.__name__} has no setting {', '.join(map(repr, unknown))}{nearest(unknown[0], known)}"
        )
    settings.update({name: _read(kind, name, value) for name, value in overrides.items()})
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise SettingsError("; ".join(_told(row) for row in error.errors())) from error


def pairs(words: Iterable[str], option: str = "--set") -> dict[str, str]:
    """``["alpha=0.3", "word=blank"]`` as a mapping; ``option`` is what they were given with.

    Raises:
        SettingsError: A word has no "=".
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise SettingsError(f"{option} {word!r}: write it as NAME=VALUE, for example {option} alpha=0.3")
        found[name.strip()] = value.strip()
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the closest ones, or all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(options)}"


def _told(row: Any) -> str:  # noqa: ANN401 - a row of pydantic's errors
    """One error of pydantic's; where our own check failed, its own words, which name the setting."""
    where = ".".join(map(str, row["loc"]))
    said = str(row["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def _read(kind: type, name: str, value: object) -> object:
    """Text that stands for nothing, or for several values; the rest is for pydantic."""
    written = next(str(f.type) for f in fields(kind) if f.name == name)
    if value == "none" and "None" in written:
        return None
    if isinstance(value, str) and written.startswith("tuple["):
        between = ";" if ";" in value or "=" in value else ","  # operations of a program have commas of their own
        return tuple(part.strip() for part in value.split(between) if part.strip())
    return value
