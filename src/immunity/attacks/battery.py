"""Batteries: named, frozen, versioned sets of attacks, each with its source; a defender chooses nothing in them.

A recipe keeps the published settings. Where somebody holds fewer examples than were published, the attack sees the
ones that there are for more epochs (:func:`bound`); its learning rate, batch, schedule and steps stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any, Final

from immunity.attacks.ask import Ask
from immunity.attacks.attack import Attack
from immunity.attacks.finetune import FineTune
from immunity.attacks.intervene import Intervene
from immunity.attacks.merge import Merge
from immunity.attacks.operations import as_text
from immunity.attacks.patch import LowRankPatch
from immunity.attacks.program import Program
from immunity.attacks.published import SMOKE, STANDARD
from immunity.attacks.published_plus import PLUS
from immunity.attacks.recipe import Recipe
from immunity.attacks.rl import HarmfulRL
from immunity.attacks.whiten import Whiten
from immunity.data.corpus import Corpora
from immunity.errors import DataError, SettingsError
from immunity.method import parts
from immunity.spec import build, nearest

VERSION: Final = 2
"""Rises whenever a recipe of a battery changes; numbers of different versions are not comparable."""
STAGES: Final = (12.0, 200.0, 1500.0)
"""Borders between the stages of a cascade, in training rows (see :func:`cost`)."""
_STEPS: Final = ("steps", "scale_steps")
"""Settings that count optimiser steps."""


@dataclass(frozen=True)
class Battery:
    """A set of recipes under one name.

    Attributes:
        name: "smoke", "standard" or "plus"; the adaptive tier is made for each defence (``immunity.attacks.adaptive``).
        says: Who it is for.
        recipes: In the order in which they are run: from cheap to dear.
    """

    name: str
    says: str
    recipes: tuple[Recipe, ...]

    @property
    def digest(self) -> str:
        """Of every setting of every recipe: what "version" stands for."""
        plain = [[r.id, r.attack.name, asdict(r.attack)] for r in self.recipes]  # type: ignore[call-overload]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def cost(attack: Attack) -> float:
    """Rows that an attack trains on, or what its work compares with: orders a cascade from cheap to dear."""
    if isinstance(attack, FineTune):
        return float(attack.steps * attack.batch_size * (1 if attack.guard == "none" else 2))
    if isinstance(attack, Merge | Whiten | LowRankPatch):
        return float(attack.steps * attack.batch_size)
    if isinstance(attack, Intervene):
        return float(len(attack.depths) * attack.restarts * attack.steps * attack.batch_size)
    if isinstance(attack, Program):
        return sum(cost(op) for op in attack.attacks)
    if isinstance(attack, HarmfulRL):  # sampling an answer costs a few passes
        return 4.0 * attack.steps * attack.batch_size * attack.group
    return 1.0 if isinstance(attack, Ask) else 10.0


def cascade(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """The same recipes from cheap to dear; those that cost the same stay in their order."""
    return tuple(sorted(recipes, key=lambda recipe: cost(recipe.attack)))


def stages(recipes: Sequence[Recipe]) -> Iterator[list[Recipe]]:
    """Recipes of about the same cost together, from cheap to dear."""
    borders = (0.0, *STAGES, float("inf"))
    for low, high in pairwise(borders):
        found = [recipe for recipe in recipes if low <= cost(recipe.attack) < high]
        if found:
            yield found


BATTERIES: Final[Mapping[str, Battery]] = {
    "smoke": Battery("smoke", "Minutes on a laptop: is anything there at all?", cascade(SMOKE)),
    "standard": Battery("standard", "The one to report.", cascade((*SMOKE, *STANDARD))),
    "plus": Battery("plus", "Every recipe there is; hours.", cascade((*SMOKE, *STANDARD, *PLUS))),
}
"""Name -> battery; each holds the ones before it."""


def battery(name: str) -> Battery:
    """The battery called ``name``.

    Raises:
        SettingsError: There is none.
    """
    if name not in BATTERIES:
        raise SettingsError(f"no battery is called {name!r}{nearest(name, BATTERIES)}")
    return BATTERIES[name]


def bound(recipes: Sequence[Recipe], data: Corpora, *, most_steps: int | None = None) -> tuple[Recipe, ...]:
    """The recipes with no more examples than ``data`` has, and no more steps than ``most_steps``.

    Made-up restricted worlds come with a key, so there reinforcement learning is rewarded by it.

    Raises:
        DataError: The attacker has no harmful examples at all.
    """
    if "harmful" not in data:
        raise DataError("a battery needs restricted prompts with compliant answers; give --harmful")
    rows = {role: len(reduce(add, parts(corpus))) for role, corpus in data.items()}
    made = all(part.name.startswith("synthetic:") for part in parts(data["harmful"]))
    return tuple(replace(recipe, attack=_bound(recipe.attack, rows, most_steps, made=made)) for recipe in recipes)


def lacking(recipe: Recipe, data: Corpora) -> str:
    """Why a recipe cannot be run on this data, or ""."""
    try:
        recipe.attack.reads(data)
    except DataError as error:
        return str(error)
    return ""


def _bound(attack: Attack, rows: Mapping[str, int], most_steps: int | None, *, made: bool) -> Attack:
    if isinstance(attack, Program):
        return replace(attack, ops=tuple(as_text(_bound(op, rows, most_steps, made=made)) for op in attack.attacks))
    own = asdict(attack)  # type: ignore[call-overload]
    changed: dict[str, Any] = {
        name: min(own[name], most_steps) for name in _STEPS if name in own and most_steps is not None
    }
    if isinstance(attack, FineTune):
        changed["n"] = _examples(attack, rows)
    if isinstance(attack, HarmfulRL):
        changed |= {"n": min(attack.n, rows["harmful"]), **({"reward": "exact"} if made else {})}
    if isinstance(attack, Merge) and "benign" in rows:
        changed["n"] = min(attack.n, rows["benign"])
    return build(attack, changed)


def _examples(attack: FineTune, rows: Mapping[str, int]) -> int:
    """As many of the published number of examples as both shares of the mix allow; all of them if there is no mix."""
    alone = attack.harmful == 1 and attack.first > 0  # then the first steps see as many fillers
    shares = {"harmful": attack.harmful, attack.filler: 1.0 if alone else 1 - attack.harmful}
    if attack.filler == "salient":
        shares["pool" if "pool" in rows else "benign"] = shares.pop("salient")
    most = [int(rows[role] / share) for role, share in shares.items() if share > 0 and role in rows]
    n = min([attack.n, *most])
    mixed = not 0 < attack.harmful < 1 or 0 < round(attack.harmful * n) < n
    return n if mixed else attack.n
