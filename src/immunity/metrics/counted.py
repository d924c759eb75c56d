"""Numbers of things in a sentence, in the singular and in the plural."""

from __future__ import annotations


def counted(n: int, one: str, many: str = "") -> str:
    """A number of things: "1 seed", "3 seeds", "1,024 prompts"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def in_units(n: int, unit: str) -> str:
    """What an attack counts in: "1 step", "16 steps", "1 change of template"; a unit without a plural stays."""
    first, _, rest = unit.partition(" ")
    if not first.endswith("s"):
        return f"{n:,} {unit}"
    return f"{counted(n, first.removesuffix('s'), first)}{rest and ' ' + rest}"


def verb(n: int, one: str, many: str) -> str:
    """The verb that goes with a number of things: ``verb(1, "is", "are")``."""
    return one if n == 1 else many
