"""Operations: every kind of attack that can be one of a chain, and how one is read from a line of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

from immunity.attacks.abliterate import Abliterate
from immunity.attacks.abliterate_search import AbliterateSearch
from immunity.attacks.asa import ASA
from immunity.attacks.ask import Ask
from immunity.attacks.attack import Attack
from immunity.attacks.difference import Interpolate, Subtract
from immunity.attacks.edits import Prune, Quantise
from immunity.attacks.finetune import FineTune
from immunity.attacks.intervene import Intervene
from immunity.attacks.merge import Merge
from immunity.attacks.patch import LowRankPatch
from immunity.attacks.rl import HarmfulRL
from immunity.attacks.steering import LoFiT, ReFT
from immunity.attacks.whiten import Whiten
from immunity.errors import SettingsError
from immunity.spec import build, nearest, pairs

OPERATIONS: Final[Mapping[str, Attack]] = {
    one.name: one
    for one in (
        FineTune(),
        Whiten(),
        LowRankPatch(),
        Ask(style="prefill"),
        Abliterate(),
        AbliterateSearch(),
        ReFT(),
        LoFiT(),
        Intervene(),
        ASA(),
        HarmfulRL(),
        Prune(),
        Quantise(),
        Interpolate(),
        Subtract(),
        Merge(),
    )
}
"""Command-line name -> default settings."""


def operation(text: str, seed: int) -> Attack:
    """An attack from a line of text: its name, then settings, as in "finetune harmful=0 steps=20".

    Args:
        text: What :func:`as_text` writes.
        seed: Of an operation that does not set its own.

    Raises:
        SettingsError: There is no such attack or setting, or a value has the wrong type.
    """
    name, *words = text.split() or [""]
    if name not in OPERATIONS:
        raise SettingsError(f"the operation {text!r} begins with no attack{nearest(name, OPERATIONS)}")
    try:
        return build(OPERATIONS[name], {"seed": str(seed), **pairs(words)})
    except SettingsError as error:
        raise SettingsError(f"the operation {text!r}: {error}") from error


def as_text(attack: Attack) -> str:
    """The line of text that :func:`operation` reads: the name, and the settings that are not the default's.

    Raises:
        SettingsError: A value holds a blank, which would end it.
    """
    default = asdict(OPERATIONS[attack.name])  # type: ignore[call-overload]
    own = asdict(attack)  # type: ignore[call-overload]
    words = {key: _word(value) for key, value in own.items() if value != default[key] and key != "seed"}
    if blank := [key for key, word in words.items() if any(map(str.isspace, word))]:
        raise SettingsError(
            f"{blank[0]} = {own[blank[0]]!r}: an operation is a line of words, so no value may hold a blank"
        )
    return " ".join([attack.name, *(f"{key}={word}" for key, word in words.items())])


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
