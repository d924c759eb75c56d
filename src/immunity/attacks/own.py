"""A battery of one's own: a file that lists attacks as a battery's recipes, in the words of the command line.

Such a file reads, in short::

    {"says": "Long and hot.",
     "recipes": [{"id": "hot", "says": "Ten times the rate.", "attack": "finetune lr=1e-3 steps=120"},
                 {"id": "twice", "says": "An honest hand first.", "attack": ["finetune harmful=0", "finetune n=16"]}]}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from immunity.attacks import battery
from immunity.attacks.attack import Attack
from immunity.attacks.battery import Battery, cascade
from immunity.attacks.operations import operation
from immunity.attacks.program import Program
from immunity.attacks.recipe import Recipe
from immunity.errors import SettingsError
from immunity.spec import nearest

ENDING: Final = ".json"
"""What tells a file from a battery's name."""
_MUST: Final = ("id", "says", "attack")
_MAY: Final = ("source", "family", "needs", "stronger_than")


def find(name: str) -> Battery:
    """The battery called ``name``: a frozen one, or that of a file.

    Raises:
        SettingsError: There is none, or its file cannot be read.
    """
    return read(name) if name.endswith(ENDING) else battery.battery(name)


def read(path: str | Path) -> Battery:
    """The battery that a file lists.

    Args:
        path: A JSON file: an object with "recipes", and perhaps "says". Each recipe is an object with "id", "says" and
            "attack" (a line as in "finetune adapter=lora lr=1e-3", or a list of lines, one after the other), and
            perhaps "source", "family", "needs" and "stronger_than", as in :class:`~immunity.attacks.recipe.Recipe`.

    Raises:
        SettingsError: The file cannot be read, or a recipe in it; the message names the file and the recipe.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: no battery can be read from it: {error}") from error
    rows = found.get("recipes") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows or (unknown := set(found) - {"says", "recipes"}):
        said = f"; {', '.join(sorted(unknown))} is unknown" if isinstance(rows, list) and rows else ""
        raise SettingsError(f'{path}: write {{"says": "…", "recipes": [{{"id": …, "says": …, "attack": …}}]}}{said}')
    recipes = tuple(_recipe(path, number, row) for number, row in enumerate(rows, 1))
    if twice := [name for name, n in Counter(one.id for one in recipes).items() if n > 1]:
        raise SettingsError(f"{path}: two recipes are called {twice[0]!r}")
    if path.stem in battery.BATTERIES:
        raise SettingsError(f"{path}: {path.stem} is the name of a battery that is frozen; name the file otherwise")
    return Battery(path.stem, str(found.get("says") or "A battery of one's own."), cascade(recipes))


def _recipe(path: Path, number: int, row: object) -> Recipe:
    where = f"{path}, recipe {number}"
    if not isinstance(row, dict):
        raise SettingsError(f"{where}: it is not an object but {row!r}")
    if missing := [name for name in _MUST if not row.get(name)]:
        raise SettingsError(f"{where}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unknown := [name for name in row if name not in (*_MUST, *_MAY)]:
        raise SettingsError(f"{where}: {unknown[0]!r} is unknown{nearest(unknown[0], (*_MUST, *_MAY))}")
    try:
        attack = _attack(row["attack"])
        return Recipe(
            id=str(row["id"]),
            attack=attack,
            source=str(row.get("source") or f"{path.name}, a battery of one's own"),
            says=str(row["says"]),
            tier="own",
            family=str(row.get("family") or attack.name),
            needs=_texts(row, "needs"),
            stronger_than=_texts(row, "stronger_than"),
        )
    except SettingsError as error:
        raise SettingsError(f"{where} ({row['id']}): {error}") from error


def _attack(given: object) -> Attack:
    if isinstance(given, str):
        return operation(given, seed=1)
    if isinstance(given, list) and all(isinstance(line, str) for line in given):
        return Program(ops=tuple(given))
    raise SettingsError(f"attack is {given!r}: write a line of text, or a list of lines")


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = row.get(name, [])
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise SettingsError(f"{name} is {given!r}: write a list of texts")
    return tuple(given)
