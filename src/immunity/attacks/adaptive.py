"""Adaptive attacks, derived from what a defence says that it does: its mechanisms.

A defence is tried by an attacker who has read how it works. Nobody can write that attacker for each defence by hand and
be believed, so he is compiled: every mechanism has its counter-attacks, whatever method it belongs to, and a defence
without a mechanism gets what suits any released model. All of them are ours; each says what it rests on.

What is not here, because nothing in the library can do it yet: distilling hidden states from the model as it was before
(against :class:`~immunity.mechanisms.Representation`), putting ill-conditioned blocks back to fresh weights (against
:class:`~immunity.mechanisms.Conditioning`), and a floor under the attacker's loss (``guards.floor`` is no setting yet).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from immunity.attacks import counters, counters_beyond, counters_relearning
from immunity.attacks.attack import Attack
from immunity.attacks.battery import cascade
from immunity.attacks.finetune import FineTune
from immunity.attacks.recipe import Recipe
from immunity.errors import SettingsError
from immunity.mechanisms import (
    Collapse,
    Conditioning,
    DirectionSpread,
    Drift,
    EntropyMinimum,
    GradientCoupling,
    Interventions,
    Layers,
    LookAhead,
    LowRankEdit,
    Mechanism,
    Patches,
    Representation,
    Unlearning,
)

_SCALES: Final = frozenset({"adamw", "adam", "schedulefree"})
"""Optimisers whose rate means the same whatever the gradient's length."""


def compiled(mechanisms: Iterable[Mechanism], *, scale: FineTune, base: str | None) -> tuple[Recipe, ...]:
    """The counter-attacks of these mechanisms, then those that suit any model; from cheap to dear, none twice.

    Args:
        mechanisms: What the defence declares; see :func:`immunity.mechanisms.read`.
        scale: A fine-tune that an undefended model of this size falls to, by AdamW or a kin of it: its examples, steps,
            learning rate, batch and seed are what everything here is measured against.
        base: The model before it was hardened, as ``immunity.models.load`` takes it; None if the attacker has none, and
            then nothing here needs it.

    Raises:
        SettingsError: The scale's learning rate cannot be carried over to AdamW, because its optimiser is another.
    """
    declared, plain = tuple(mechanisms), _plain(scale)
    pace = _pace(declared)
    found = [row for one in declared for row in (*_against(one, plain, pace), *_beyond(one, plain, base))]
    return cascade(_once([*found, *counters_beyond.any_model(plain, base)]))


def _plain(scale: FineTune) -> FineTune:
    """The attack that the others are shifted from: harmful rows alone, nothing guarded, a fresh adapter if any."""
    if scale.optimizer not in _SCALES:
        raise SettingsError(f"scale: optimizer = {scale.optimizer!r}: use one of {', '.join(sorted(_SCALES))}")
    return replace(
        scale,
        harmful=1.0,
        filler="benign",
        first=0.0,
        style="plain",
        adapter="lora" if scale.adapter == "continue" else scale.adapter,
        layers="all",
        warmup=0.0,
        guard="none",
    )


def _pace(mechanisms: tuple[Mechanism, ...]) -> float:
    """Length of an SGD step well inside every simulated one."""
    known = [one.length / 10 for one in mechanisms if isinstance(one, LookAhead) and one.length is not None]
    return min([counters.PACE, *known])


def _against(one: Mechanism, plain: FineTune, pace: float) -> Iterator[Recipe]:
    """By training."""
    match one:
        case LookAhead():
            yield from counters.off_the_radius(one, plain)
            yield from counters.not_simulated(one, plain)
        case Drift(per=per) if per != "state":
            yield from counters.drifting_farther(one, plain)
        case Collapse(word=word):
            yield from counters.held_back(plain, pace, word)
            yield from counters.replayed(plain, "general")
            yield from counters.rounds(plain, "general")
            yield from counters.pathways(plain)
        case GradientCoupling():
            yield from counters.held_back(plain, pace)
            yield from counters.replayed(plain, "benign")
            yield from counters.rounds(plain, "benign")
            yield from counters.pathways(plain)
        case Layers(protected=blocks) | Representation(layers=blocks):
            yield from counters.elsewhere(plain, blocks)
        case Conditioning():
            yield from counters.preconditioned(plain)
        case Unlearning():
            yield from counters_relearning.relearnt(plain)


def _beyond(one: Mechanism, plain: FineTune, base: str | None) -> Iterator[Recipe]:
    """By other means than one fine-tune."""
    if isinstance(one, Drift) and one.per == "state":
        yield from counters_beyond.noisier(one, plain)
    match one:
        case Drift() | Representation():
            yield from counters_beyond.latent(plain)
        case Interventions():
            yield from counters_beyond.refitted(one, plain)
        case Patches():
            yield from counters_beyond.patched_beyond(one, plain)
            yield from counters.other_rates(plain, "an adversary of one kind was simulated, at one rate")
        case LowRankEdit(k=rank):
            yield from counters_beyond.rank_undone(plain, rank)
            yield from counters_beyond.rank_taken_out(plain, rank, base)
        case EntropyMinimum():
            yield from counters_beyond.entropy_paid(plain)
        case DirectionSpread():
            yield from counters_beyond.more_directions(plain)


def _once(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Each attack once, under the first of its names; a name that is taken by another attack gets a number."""
    found: dict[Attack, Recipe] = {}
    names: dict[str, int] = {}
    for recipe in recipes:
        if recipe.attack not in found:
            count = names[recipe.id] = names.get(recipe.id, 0) + 1
            found[recipe.attack] = recipe if count == 1 else replace(recipe, id=f"{recipe.id}-{count}")
    return list(found.values())
