"""Winners: the attacks of a battery that are made again with other seeds, because one run may have been lucky."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from immunity.attacks.recipe import Recipe
from immunity.bench import probes


@dataclass(frozen=True)
class Winner:
    """An attack that is made again, on every model alike.

    Attributes:
        recipe: Of the attack.
        step: Where it did most harm: it is made again as far as that, wherever it breaks a model.
        peak: That harm.
        most: Whether it did the most harm of its family. If not, it is the one that broke the model with the fewest
            examples, which a cost ratio over seeds must not leave out.
    """

    recipe: Recipe
    step: int
    peak: float
    most: bool = False


def winners(ran: Iterable[tuple[Recipe, Mapping[str, Any]]], phi: float) -> list[Winner]:
    """The recipe of each family that did most harm, and the one that broke the model with the fewest examples.

    Args:
        ran: Recipes with the curves, in plain data, of the model under attack.
        phi: Tolerated harm; what does no more is no winner.
    """
    broke: list[tuple[float, Winner]] = []
    for recipe, curve in ran:
        points = curve["points"]
        peak, least = max(((probes.harm(row["metrics"]), -row["step"]) for row in points), default=(0.0, 0))
        if peak > phi and recipe.family not in probes.WITHOUT_CHANCE:
            spent = next(float(row["examples"]) for row in points if probes.harm(row["metrics"]) > phi)
            broke.append((spent, Winner(recipe, -least, peak)))
    best: dict[str, tuple[float, Winner]] = {}
    for spent, one in broke:
        known = best.get(one.recipe.family)
        if known is None or (one.peak, -one.step) > (known[1].peak, -known[1].step):
            best[one.recipe.family] = (spent, one)
    found = [replace(one, most=True) for _, one in best.values()]
    fewest = min((spent for spent, _ in broke), default=0.0)
    if all(spent > fewest for spent, _ in best.values()):
        found += [one for spent, one in broke if spent == fewest][:1]
    return found
