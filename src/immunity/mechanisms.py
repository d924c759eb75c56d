"""Mechanisms: what a defence does to a model, as far as an attacker can turn it against the defence.

A method declares them (``Method.mechanisms``); they are written in the record beside the hardened model, read back by
the attacker, and the counter-attacks are derived from them (``immunity.attacks.adaptive``). They are a defence's own
account of itself: what is not declared is not attacked, so a claim of strength rests on the list being complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias

from immunity.errors import SettingsError

TAG: Final = "mechanism"
"""The key that says which mechanism a written one is."""
HALVES: Final = ("all", "first-half", "last-half", "middle", "even", "odd")
"""Names for sets of blocks; a list such as "0,3,5" is the other way to say it."""


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """It simulates an attacker and prepares for where that attacker arrives (MLAC, TAR, Booster, CTRAP).

    Attributes:
        steps: How many steps are simulated: K.
        radius: Of each step: a learning rate if the rule is "plain" or "adamw", else a distance in weight space.
        rule: How the simulated attacker steps (see ``immunity.simulated.walker``); "adamw" is the optimiser itself.

    Raises:
        SettingsError: A value is out of range.
    """

    steps: int
    radius: float
    rule: Literal["plain", "normalised", "adam", "adamw"]

    def __post_init__(self) -> None:
        _check("steps", self.steps, type(self.steps) is int and self.steps >= 1, "a whole number from 1")
        _check("radius", self.radius, _positive(self.radius), "a positive number")
        known = {"plain", "normalised", "adam", "adamw"}
        _check("rule", self.rule, self.rule in known, "plain, normalised, adam or adamw")

    @property
    def length(self) -> float | None:
        """Of a step in weight space; None where the rule gives only a rate."""
        return None if self.rule in {"plain", "adamw"} else self.radius


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """An attacked model stops being a language model (CTRAP, SDD, SEAM).

    Attributes:
        word: What it says then, over and over; "" if it falls to nothing in particular.
        on: The role of the data on which it was taught to fall.

    Raises:
        SettingsError: A value is not text, or ``on`` is empty.
    """

    word: str
    on: str

    def __post_init__(self) -> None:
        _check("word", self.word, isinstance(self.word, str), "a word, or empty")
        _check("on", self.on, self.on != "" and isinstance(self.on, str), "the name of a role")


@dataclass(frozen=True, kw_only=True)
class GradientCoupling:
    """Harmful and benign gradients are made to oppose each other: learning harm unlearns everything else (SEAM)."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Only some blocks were hardened (Targeted Vaccine, LAPT).

    Attributes:
        protected: Which: "first-half", "last-half", "middle", "even", "odd" or "0,3,5".

    Raises:
        SettingsError: It names no blocks.
    """

    protected: str

    def __post_init__(self) -> None:
        _check("protected", self.protected, _blocks(self.protected), f"one of {', '.join(HALVES)}, or like 0,3,5")


@dataclass(frozen=True, kw_only=True)
class LowRankEdit:
    """The defence is a change of low rank to the weights (LoX).

    Attributes:
        k: The rank.

    Raises:
        SettingsError: It is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check("k", self.k, type(self.k) is int and self.k >= 1, "a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Harmful learning is made slow by bad conditioning (condition number, SOPHON, NTL)."""


@dataclass(frozen=True, kw_only=True)
class EntropyMinimum:
    """Answers to harmful prompts are so certain that reinforcement finds nothing to choose from (Token Buncher)."""


@dataclass(frozen=True, kw_only=True)
class Representation:
    """Hidden states of harmful prompts are drowned in noise or led elsewhere (RepNoise, Circuit Breakers).

    Attributes:
        layers: Of which blocks, as in :class:`Layers`; "all" for all of them.

    Raises:
        SettingsError: It names no blocks.
    """

    layers: str

    def __post_init__(self) -> None:
        _check("layers", self.layers, _blocks(self.layers), f"one of {', '.join(HALVES)}, or like 0,3,5")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Answers were made to bear a drift of hidden states (Vaccine, Targeted Vaccine, LAPT).

    Attributes:
        radius: The norm of the drift that was prepared for.
        per: What has that norm: the drift of what attention adds, of a "batch" over its examples and the blocks, of an
            "example", or of a "layer" over a batch. Or, for each "state", that of a block's output in one position,
            which the norm is then a multiple of.
        layers: Of which blocks, as in :class:`Layers`; "all" for all of them, or for some that nobody knows beforehand.

    Raises:
        SettingsError: A value is out of range, or ``layers`` names no blocks.
    """

    radius: float
    per: Literal["batch", "example", "layer", "state"]
    layers: str

    def __post_init__(self) -> None:
        _check("radius", self.radius, _positive(self.radius), "a positive number")
        known = {"batch", "example", "layer", "state"}
        _check("per", self.per, self.per in known, "batch, example, layer or state")
        _check("layers", self.layers, _blocks(self.layers), f"one of {', '.join(HALVES)}, or like 0,3,5")


@dataclass(frozen=True, kw_only=True)
class DirectionSpread:
    """Refusal is spread over many directions, so that removing one does not remove it."""


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Restricted answers were made unlikely in a model that had them (NPO, ILU, RepNoise, SEAM, NTL, MLAC, TAR)."""


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """Edits of hidden states that were trained to do harm were undone, block by block (E.T.).

    Attributes:
        where: What they edited: the "input" or the "output" of a block.
        rank: Theirs.
        steps: For how many optimiser steps each was trained.

    Raises:
        SettingsError: A value is out of range.
    """

    where: Literal["input", "output"]
    rank: int
    steps: int

    def __post_init__(self) -> None:
        _check("where", self.where, self.where in {"input", "output"}, "input or output")
        _check("rank", self.rank, type(self.rank) is int and self.rank >= 1, "a whole number from 1")
        _check("steps", self.steps, type(self.steps) is int and self.steps >= 1, "a whole number from 1")


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The worst change of low rank and bounded length to some linear layers was prepared for (AntiDote).

    Attributes:
        rank: Of the change.
        radius: Its length beside the weight's own, matrix by matrix.
        targets: Which layers: "attention" or "all-linear".

    Raises:
        SettingsError: A value is out of range.
    """

    rank: int
    radius: float
    targets: Literal["attention", "all-linear"]

    def __post_init__(self) -> None:
        _check("rank", self.rank, type(self.rank) is int and self.rank >= 1, "a whole number from 1")
        _check("radius", self.radius, _positive(self.radius), "a positive number")
        _check("targets", self.targets, self.targets in {"attention", "all-linear"}, "attention or all-linear")


Mechanism: TypeAlias = (
    LookAhead
    | Collapse
    | GradientCoupling
    | Layers
    | LowRankEdit
    | Conditioning
    | EntropyMinimum
    | Representation
    | Drift
    | DirectionSpread
    | Unlearning
    | Interventions
    | Patches
)

KINDS: Final[Mapping[str, type[Mechanism]]] = {
    "look-ahead": LookAhead,
    "collapse": Collapse,
    "gradient-coupling": GradientCoupling,
    "layers": Layers,
    "low-rank-edit": LowRankEdit,
    "conditioning": Conditioning,
    "entropy-minimum": EntropyMinimum,
    "representation": Representation,
    "drift": Drift,
    "direction-spread": DirectionSpread,
    "unlearning": Unlearning,
    "interventions": Interventions,
    "patches": Patches,
}
"""Name in a record -> class."""
_NAMES: Final = {kind: name for name, kind in KINDS.items()}


def written(mechanisms: Iterable[Mechanism]) -> list[dict[str, Any]]:
    """As plain data: one mapping each, tagged with the mechanism's name. :func:`read` is the inverse."""
    return [{TAG: _NAMES[type(one)], **asdict(one)} for one in mechanisms]


def read(rows: Iterable[Mapping[str, Any]]) -> tuple[Mechanism, ...]:
    """Mechanisms from plain data, in the order they were written.

    Raises:
        SettingsError: A row names no mechanism that is known here, or its values are not that mechanism's.
    """
    return tuple(_one(row) for row in rows)


def _one(row: Mapping[str, Any]) -> Mechanism:
    name: Any = row.get(TAG)
    if name not in KINDS:
        raise SettingsError(
            f"mechanism {name!r} is not known: this version knows {', '.join(KINDS)}. A newer version may have written "
            "the record: update immunity, or the attacks against it would be left out unseen"
        )
    kind, values = KINDS[name], {key: value for key, value in row.items() if key != TAG}
    wanted = [field.name for field in fields(kind)]
    if set(values) != set(wanted):
        raise SettingsError(
            f"mechanism {name!r} has {', '.join(wanted) or 'no value'}, not {', '.join(values) or 'none'}"
        )
    return kind(**values)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise SettingsError(f"{name} = {value!r}: say {wanted}")


def _positive(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def _blocks(text: object) -> bool:
    return isinstance(text, str) and (text in HALVES or all(part.strip().isdigit() for part in text.split(",")))
