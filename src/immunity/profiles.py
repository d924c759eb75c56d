"""Who is simulated, in words: "adamw lr=3e-5..3e-4 replay=0..0.5", or "sgd lr=0.03 momentum=0.9 on=benign"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from immunity.errors import SettingsError

Stepper = Literal["adamw", "adam", "sgd", "nesterov"]
Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Profile:
    """Who a member of a pool is. What has a range is drawn anew each time that he starts anew.

    Attributes:
        optimizer: "adamw", "adam", "sgd" or "nesterov", without weight decay.
        lr: Least and greatest learning rate; drawn evenly in its logarithm.
        momentum: Of "sgd" and "nesterov".
        r: Rank of the LoRA adapter (α = 2 r) that he trains over full weights; 0 trains what the defence trains. Where
            the defence trains an adapter itself, he trains that one, whatever r is.
        on: "harmful": an attacker; "benign": an honest user.
        mix: Least and greatest share of benign rows among an attacker's.
        replay: Least and greatest share of general rows among his.
        domain: (i, n): his restricted rows are those of the i-th (from 0) of the n corpora that share each batch.

    Raises:
        SettingsError: A value is out of range.
    """

    optimizer: Stepper
    lr: Range
    momentum: float = 0.0
    r: int = 0
    on: Literal["harmful", "benign"] = "harmful"
    mix: Range = (0.0, 0.0)
    replay: Range = (0.0, 0.0)
    domain: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        rules = {
            "optimizer": self.optimizer in get_args(Stepper),
            "lr": 0 < self.lr[0] <= self.lr[1] < math.inf,
            "momentum": 0 <= self.momentum < 1 and (self.momentum > 0) >= (self.optimizer == "nesterov"),
            "r": self.r >= 0,
            "on": self.on in {"harmful", "benign"},
            "mix": 0 <= self.mix[0] <= self.mix[1] and (self.on == "harmful" or self.mix[1] == 0),
            "replay": 0 <= self.replay[0] <= self.replay[1] and self.mix[1] + self.replay[1] < 1,
            "domain": 0 <= self.domain[0] < self.domain[1],
        }
        for name, good in rules.items():
            if not good:
                raise SettingsError(f"{name} = {getattr(self, name)!r} is out of range: see the help of Profile.{name}")

    @classmethod
    def read(cls, text: str) -> Profile:
        """A profile from words: "sgd lr=0.01..0.1 momentum=0.9 domain=1/2 mix=0..0.5", "adamw lr=1e-4 on=benign".

        Raises:
            SettingsError: A word is not known, or a value cannot be read; the message shows the text.
        """
        optimizer, *words = text.split() or [""]
        given = {name: value for name, _, value in (word.partition("=") for word in words)}
        if unknown := [name for name in given if name not in _READ] or [w for w in words if "=" not in w]:
            raise SettingsError(
                f"pool: {unknown[0]!r} in {text!r} is not known; write {', '.join(_READ)} as NAME=VALUE"
            )
        if "lr" not in given:
            raise SettingsError(
                f"pool: {text!r} has no learning rate; write lr=1e-4, or lr=1e-5..1e-3 to have it drawn"
            )
        try:
            values: dict[str, Any] = {name: _READ[name](value) for name, value in given.items()}
            return cls(optimizer=cast("Stepper", optimizer), **values)
        except (ValueError, SettingsError) as error:
            raise SettingsError(f"pool: {text!r}: {error}") from error


def _range(text: str) -> Range:
    low, dots, high = text.partition("..")
    return float(low), float(high if dots else low)


def _domain(text: str) -> tuple[int, int]:
    which, _, many = text.partition("/")
    return int(which), int(many)


_READ: Final[Mapping[str, Callable[[str], object]]] = {
    "lr": _range,
    "momentum": float,
    "r": int,
    "on": str,
    "mix": _range,
    "replay": _range,
    "domain": _domain,
}
