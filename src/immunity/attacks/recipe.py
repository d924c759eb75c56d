"""Recipe: an attack with a name, a place in a battery, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters, digits
from typing import Final, Literal

from immunity.attacks.attack import Attack
from immunity.errors import SettingsError

Tier = Literal["smoke", "standard", "plus", "adaptive", "own"]
NEEDS: Final = ("base",)
"""What a recipe may need beyond the model and the attacker's data: the model before it was hardened."""

_LETTERS: Final = frozenset(f"{ascii_letters}{digits}-._/")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of a battery: an attack as a frozen value, and why it is there.

    Attributes:
        id: Stands in results and on pages; never given to another attack. Letters, digits and "-._/".
        attack: The settings, whole.
        source: The paper or repository with the kind of evidence ("read in the repository"), or "our own" and why.
        says: What the attacker does, in one sentence.
        tier: The battery it belongs to.
        family: What it is tuned and grouped with ("full", "LoRA", "weights", "rounds" …).
        needs: What it cannot run without, beside the model and the attacker's data: see :data:`NEEDS`.
        stronger_than: Ids of recipes that should not beat this one; where one does, a flag says so.

    Raises:
        SettingsError: A text is empty, or an id or a need is not one.
    """

    id: str
    attack: Attack
    source: str
    says: str
    tier: Tier
    family: str
    needs: tuple[str, ...] = ()
    stronger_than: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for one in (self.id, *self.stronger_than):
            if not one or set(one) - _LETTERS:
                raise SettingsError(f"recipe id {one!r}: use letters, digits, hyphens, dots, underscores and slashes")
        if self.id in self.stronger_than:
            raise SettingsError(f"recipe {self.id!r} cannot be stronger than itself")
        empty = [
            name
            for name, text in (("source", self.source), ("says", self.says), ("family", self.family))
            if not text.strip()
        ]
        if empty:
            raise SettingsError(f"recipe {self.id!r} says nothing for {', '.join(empty)}")
        if unknown := [need for need in self.needs if need not in NEEDS]:
            raise SettingsError(f"recipe {self.id!r} needs {', '.join(unknown)}: known are {', '.join(NEEDS)}")
