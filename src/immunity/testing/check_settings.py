"""Checks of what a method or an attack is before it does anything: a value that says what it is."""

from __future__ import annotations

import inspect
import json
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
from typing import Any, Final, get_args

from immunity import mechanisms, spec
from immunity.attacks.attack import Attack
from immunity.data.corpus import ROLES
from immunity.errors import ImmunityError, SettingsError
from immunity.method import Block, Card, Method
from immunity.testing.watch import ContractError, require

MOST_SETTINGS: Final = 10
FIRST_YEAR: Final = 1950
PLAIN: Final = (str, int, float, bool, type(None))


def is_a_frozen_value(subject: Method | Attack) -> None:
    """A frozen, keyword-only dataclass that can be hashed; a method has at most ten settings."""
    kind = type(subject)
    name = kind.__name__
    require(is_dataclass(subject), f"{name} is no dataclass: write @dataclass(frozen=True, kw_only=True) over it")
    require("__dataclass_fields__" in vars(kind), f"{name} inherits its settings: write @dataclass over it too")
    try:
        setattr(subject, "no_setting", 1)  # noqa: B010 - the assignment is what is tested
    except FrozenInstanceError:
        pass
    else:
        delattr(subject, "no_setting")
        raise ContractError(f"{name} can be changed after it was made: write @dataclass(frozen=True, kw_only=True)")
    loose = [f.name for f in fields(subject) if not f.kw_only]  # type: ignore[arg-type]
    require(not loose, f"{name} takes {', '.join(loose)} by position: write @dataclass(frozen=True, kw_only=True)")
    try:
        hash(subject)
    except TypeError as error:
        raise ContractError(f"{name} has a setting that can change ({error}): use numbers, text and tuples") from error
    if isinstance(subject, Method):
        count = len(fields(subject))  # type: ignore[arg-type]
        require(
            count <= MOST_SETTINGS, f"{name} has {count} settings, more than {MOST_SETTINGS}: it may be two methods"
        )


def settings_survive_json(subject: Method | Attack) -> None:
    """Settings written as JSON, or one by one as text, and read back are equal; what does not exist is refused."""
    name, mine = type(subject).__name__, asdict(subject)  # type: ignore[call-overload]
    try:
        written = json.dumps(mine, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"{name}: its settings cannot be written as JSON: {error}") from error
    back = _built(subject, json.loads(written))
    require(back == subject, f"{name}: {subject!r} comes back from JSON as {back!r}")
    for setting, value in mine.items():
        if isinstance(value, PLAIN):
            text = "none" if value is None else str(value)
            back = _built(subject, {setting: text})
            require(back == subject, f"{name}: --set {setting}={text} gives {back!r}, not {subject!r}")
    _require_refused(subject, {"no_such_setting": 1}, "no_such_setting = 1")
    for setting, value in mine.items():
        if isinstance(value, int | float):
            _require_refused(subject, {setting: "not a number"}, f"{setting} = 'not a number'")


def says_what_it_is(subject: Method | Attack) -> None:
    """The card (an attack: name and threat) is complete; the docstring gives every setting and the departures.

    A method's mechanisms are known ones that survive JSON; a baseline, or one whose strength is 0, has none.
    """
    name = type(subject).__name__
    text = inspect.cleandoc(type(subject).__doc__ or "")
    silent = [f.name for f in fields(subject) if f"{f.name}:" not in text]  # type: ignore[arg-type]
    require(not silent, f"{name}: its docstring does not explain {', '.join(silent)}: write `setting: what it does`")
    require(
        "Departures from the paper" in text,
        f"{name}: its docstring has no 'Departures from the paper': silence claims fidelity. Write 'None known' if so",
    )
    if isinstance(subject, Attack):
        require(bool(inspect.getattr_static(subject, "name", "")), f"{name} has no `name`")
        require(bool(subject.threat.says.strip()), f"{name}: its threat says nothing")
        return
    require(has_card(subject), f"{name} has no card: write `card: ClassVar[Card] = Card(…)`")
    _require_complete(name, subject.card)
    _require_mechanisms(subject)
    for role, count in subject.reads.items():
        require(role in ROLES, f"{name} reads the role {role!r}: use one of {', '.join(ROLES)}")
        require(
            type(count) is int and count >= 1, f"{name} reads {count!r} batches of {role!r}: at least 1, or not at all"
        )


def has_card(method: Method) -> bool:
    """Whether a method has a card at all; without one nothing else of it can be checked."""
    return isinstance(inspect.getattr_static(method, "card", None), Card)


def _require_complete(name: str, card: Card) -> None:
    empty = [
        field
        for field, value in (("name", card.name), ("paper", card.paper), ("family", card.family),
                             ("gradients", card.gradients), ("says", card.says))
        if not value.strip()
    ]  # fmt: skip
    require(not empty, f"{name}: its card is empty at {', '.join(empty)}")
    require(card.block in get_args(Block), f"{name}: {card.block!r} is no block of the taxonomy")
    require(card.year >= FIRST_YEAR, f"{name}: its card is of the year {card.year}")
    known = card.block == "baseline" or bool(card.arxiv or card.elsewhere)
    require(known, f"{name}: its card has no arXiv identifier; only a baseline goes without")


def _require_mechanisms(method: Method) -> None:
    name: str = type(method).__name__
    declared: Any = method.mechanisms
    known = isinstance(declared, tuple) and all(type(one) in mechanisms.KINDS.values() for one in declared)
    require(known, f"{name}: `mechanisms` is {declared!r}: give a tuple of the values in immunity.mechanisms")
    require(len(set(declared)) == len(declared), f"{name} declares a mechanism twice: {declared!r}")
    back = mechanisms.read(json.loads(json.dumps(mechanisms.written(declared), allow_nan=False)))
    require(back == declared, f"{name}: its mechanisms {declared!r} come back from JSON as {back!r}")
    if method.card.block == "baseline":
        require(not declared, f"{name} is a baseline, yet declares {declared!r}: a baseline does nothing to a model")
    strength = inspect.getattr_static(method, "strength", "")
    if strength:
        weak = spec.build(method, {strength: 0}).mechanisms
        require(not weak, f"{name} with {strength} = 0 is SFT, yet declares {weak!r}: nothing was done to the model")


def _built(subject: Method | Attack, settings: dict[str, Any]) -> Method | Attack:
    try:
        return spec.build(subject, settings)
    except ImmunityError as error:
        raise ContractError(
            f"{type(subject).__name__}: its own settings, written and read, are refused: {error}"
        ) from error


def _require_refused(subject: Method | Attack, settings: dict[str, Any], words: str) -> None:
    try:
        built = spec.build(subject, settings)
    except SettingsError:
        return
    raise ContractError(f"{type(subject).__name__}: {words} gives {built!r}: it must be refused with a SettingsError")
