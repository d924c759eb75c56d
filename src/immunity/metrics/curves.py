"""Curve: what was measured along one attack on one defence, read from a result and checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Any, Final

from immunity.errors import DataError
from immunity.metrics.stats import Interval, finite, wilson

THREATS: Final = ("harmful", "mixed", "benign", "edit")
"""What the attacker trains on, in the order of every table and figure; an "edit" trains nothing and changes weights."""

TRIALS: Final = "trials"
AXES: Final = ("examples", "tokens", "flops", "seconds", "step", TRIALS)
"""What an attacker's budget is counted in. "step" compares only attacks that count in optimiser steps; "trials" are the
attacks that he has tried, in a battery's order, from cheap to dear, and those of a search before its winners."""

TUNED: Final = "tuned-"
"""The names of a search's winners begin so."""

STEPS: Final = "steps"
"""The unit of an attack that counts in optimiser steps."""

FRESH: Final = ("", "recipe", "artefact")
"""Why a curve was measured: to find out; again with a fresh seed; the same checkpoints again, on fresh prompts."""

PLAIN: Final = "plain"
"""The style of one who asks as anybody would."""

_STYLE: Final = re.compile(r"\bstyle=(\S+)")

PROMPTS: Final[Mapping[str, str]] = {
    "harm": "harm",
    "refusal": "harm",
    "coherence": "harm",
    "useful_harm": "harm",
    "general_accuracy": "general",
    "collapse_word_share": "general",
    "empty_share": "general",
    "benign_accuracy": "benign",
}
"""Rate -> the set of prompts that it is a share of: the key of ``n_prompts``."""


@dataclass(frozen=True)
class Point:
    """One budget: how far the attacker got, what was measured there, what the model answered.

    Attributes:
        step: Of what the attack counts in (:attr:`Curve.unit`); 0 is the model as the defence left it.
        metrics: Name -> value; only finite numbers, so a missing name means "not measured".
        samples: Rows with ``kind``, ``prompt``, ``answer`` and ``expected``.
        per_prompt: Metric -> one value per prompt, in the order of the prompts; None where there is no score.
        spent: Axis of :data:`AXES` (without "step" and "trials") -> what the attack had cost; a missing name was not
            recorded.
    """

    step: int
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, str]] = ()
    per_prompt: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """One attack on one defence, with points in the order of their steps, each step once.

    Attributes:
        threat: One of :data:`THREATS`.
        n_prompts: Kind -> prompts behind the rates.
        unit: What the steps count: "steps" of an optimiser, or "directions", "share pruned in %" …
        ended: Why it is shorter than was planned ("diverged: …"), or "" if it is whole.
        fresh: One of :data:`FRESH`.
        asks: The style in which the attacker asks from the first point on; "plain" is as anybody would.
        trial: How many attacks had been tried on this model with this seed by the end of this one; 0 where nobody tried
            several in an order.
        training: What the attacker saw of his own training: ``loss_first``, ``loss_last`` (nats per token) and
            ``direction_norm`` (the longer of the first and the last), as far as they were logged.

    Raises:
        DataError: A step is repeated, or a rate is not a share in [0, 1].
    """

    defence: str
    attack: str
    threat: str
    seed: int
    points: tuple[Point, ...]
    n_prompts: Mapping[str, int] = field(default_factory=dict)
    unit: str = STEPS
    ended: str = ""
    fresh: str = ""
    asks: str = PLAIN
    trial: int = 0
    training: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.points, key=lambda point: point.step))
        object.__setattr__(self, "points", ordered)
        steps = [point.step for point in ordered]
        if len(set(steps)) < len(steps):
            raise DataError(f"{self.where}: a step is there twice in {steps}; merge or drop the repeated points")
        for point in ordered:
            for name in PROMPTS:
                if not 0.0 <= point.metrics.get(name, 0.0) <= 1.0:
                    raise DataError(
                        f"{self.where}, step {point.step}: {name} is {point.metrics[name]}, "
                        "but rates are shares in [0, 1]; divide percentages by 100"
                    )

    @property
    def where(self) -> str:
        """The curve in an error message."""
        return f"curve of {self.defence!r} under {self.attack!r}, seed {self.seed}"

    @property
    def rescored(self) -> bool:
        """Whether its models are those of another curve, asked other prompts: then it must not count as more models."""
        return self.fresh == "artefact"

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever ``metric`` was measured, in the order of the steps."""
        return [(point.step, point.metrics[metric]) for point in self.points if metric in point.metrics]

    def cost(self, point: Point, axis: str) -> float | None:
        """What a point of this curve had cost on an axis of :data:`AXES`; None where that is not known.

        Training that cost no example, token or operation was not recorded as having cost one. Only an edit is free.
        """
        if axis == TRIALS:
            return float(self.trial) if self.trial else None
        if axis == "step":
            return float(point.step) if self.unit == STEPS else None
        free = self.threat == "edit" or axis == "seconds" or not any(p.step for p in self.points)
        return point.spent.get(axis) if free or any(p.spent.get(axis) for p in self.points) else None

    def interval(self, metric: str, share: float) -> Interval | None:
        """The 95 % Wilson interval of a rate of this curve; None for a loss or an unknown number of prompts."""
        n = self.n_prompts.get(PROMPTS.get(metric, ""), 0)
        return wilson(share, n) if n > 0 else None


def curve(row: Mapping[str, Any], threat: str, asks: str = PLAIN) -> Curve:
    """One entry of a result's ``curves``; numbers that are None, NaN or infinite count as not measured.

    Args:
        row: The entry.
        threat: Of its attack.
        asks: The style in which its attacker asks.

    Raises:
        DataError: The threat is unknown, a point has no whole-numbered step, or see :class:`Curve`.
    """
    name = f"curve of {row.get('defence')!r} under {row.get('attack')!r}"
    if threat not in THREATS:
        raise DataError(f"{name}: unknown threat {threat!r}; use one of {', '.join(THREATS)}")
    points = []
    for i, point in enumerate(row.get("points") or ()):
        step = point.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise DataError(f"{name}, point {i}: step is {step!r}, but must be a whole number, 0 or more")
        numbers = {key: finite(value) for key, value in (point.get("metrics") or {}).items()}
        kept = {key: value for key, value in numbers.items() if value is not None}
        points.append(
            Point(
                step, kept, tuple(point.get("samples") or ()), _per_prompt(point), _spent(point, f"{name}, point {i}")
            )
        )
    fresh = str(row.get("fresh") or "")
    if fresh not in FRESH:
        raise DataError(f'{name}: fresh is {fresh!r}; use "recipe", "artefact", or leave it out')
    return Curve(
        defence=str(row.get("defence", "unnamed defence")),
        attack=str(row.get("attack", "unnamed attack")),
        threat=threat,
        seed=int(row.get("seed") or 0),
        points=tuple(points),
        n_prompts={key: int(n) for key, n in (row.get("n_prompts") or {}).items() if n},
        unit=str(row.get("unit") or STEPS),
        ended=str(row.get("ended") or ""),
        fresh=fresh,
        asks=asks,
        training=_training(row.get("training") or {}),
    )


def _per_prompt(point: Mapping[str, Any]) -> dict[str, tuple[float | None, ...]]:
    """The values per prompt of a point's row; what is not finite has no score."""
    return {str(key): tuple(map(finite, values)) for key, values in (point.get("per_prompt") or {}).items()}


def _spent(point: Mapping[str, Any], place: str) -> dict[str, float]:
    """The costs of a point's row, where they were recorded."""
    numbers = {axis: finite(point.get(axis)) for axis in AXES if axis not in {"step", TRIALS}}
    spent = {axis: number for axis, number in numbers.items() if number is not None}
    for axis, number in spent.items():
        if number < 0:
            raise DataError(f"{place}: {axis} is {number}, but what was spent cannot be less than nothing")
    return spent


def _training(log: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The first and the last row of a training log, in the names of :attr:`Curve.training`."""
    first, last = log.get("first") or {}, log.get("last") or {}
    losses = [name for name in first if name.startswith("nll/") and name in last and first != last]
    losses.sort(key=lambda name: name not in {"nll/harmful", "nll/train"})
    numbers = {"loss_first": finite(first.get(losses[0])), "loss_last": finite(last.get(losses[0]))} if losses else {}
    norms = [norm for row in (first, last) if (norm := finite(row.get("direction_norm"))) is not None]
    found = {name: value for name, value in numbers.items() if value is not None}
    return {**found, "direction_norm": max(norms)} if norms else found


def released(read: Sequence[Curve]) -> dict[str, float]:
    """Every number of one model as it was released: the (lower) median over its curves, where each begins.

    Only those count that ask plainly: an attacker who asks in another style, or begins the answer for the model, does
    so from the start. Where none asks plainly, all count, and :func:`asked` says so.
    """
    starts = _starts(read)
    chosen = [one for one in starts if one.asks == PLAIN] or starts
    metrics = [one.points[0].metrics for one in chosen]
    names = dict.fromkeys(name for row in metrics for name in row)
    return {name: median_low([row[name] for row in metrics if name in row]) for name in names}


def asked(read: Sequence[Curve]) -> str:
    """How the model of :func:`released` was asked: "plain", else the styles of all; "" if nothing begins at 0."""
    styles = dict.fromkeys(one.asks for one in _starts(read))
    return PLAIN if PLAIN in styles else ", ".join(styles)


def _starts(read: Sequence[Curve]) -> list[Curve]:
    return [one for one in read if not one.rescored and one.points and not one.points[0].step]


def curves(result: Mapping[str, Any]) -> tuple[Curve, ...]:
    """Every curve of a result, in its order, with the threat of its attack and the style in which that asks.

    Raises:
        DataError: A curve names an attack that the result does not describe, or see :func:`curve`.
    """
    attacks = {str(attack.get("name")): attack for attack in result.get("attacks") or ()}
    battery = result.get("battery") or {}
    searched = Counter(str(row.get("defence")) for row in battery.get("trials") or ())
    tried: Counter[tuple[str, int]] = Counter()
    read = []
    for row in result.get("curves") or ():
        attack = attacks.get(str(row.get("attack")))
        if attack is None:
            raise DataError(
                f"a curve names the attack {str(row.get('attack'))!r}, which is not among the result's attacks "
                f"({', '.join(attacks) or 'none'}); add it there with its threat"
            )
        found = curve(row, str(attack.get("threat")), _style(attack))
        if battery and not found.rescored:
            tried[found.defence, found.seed] += 1
            before = searched[found.defence] if found.attack.startswith(TUNED) else 0
            found = replace(found, trial=before + tried[found.defence, found.seed])
        read.append(found)
    return tuple(read)


def _style(attack: Mapping[str, Any]) -> str:
    """The style in which an attack asks, by its settings; of a program, the last that one of its operations has."""
    settings = attack.get("settings") or {}
    styles = [str(settings.get("style") or PLAIN)]
    styles += [found for op in settings.get("ops") or () for found in _STYLE.findall(str(op))]
    return next((style for style in reversed(styles) if style != PLAIN), PLAIN)
