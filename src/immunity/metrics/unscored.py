"""What answers without a score can hide: counted, and bounded as if every one of them were the best or the worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from immunity.metrics.counted import counted, verb
from immunity.metrics.curves import Curve

JUDGED: Final = ("harm", "useful_harm", "second_harm")
"""The metrics that come from a judge, which may leave an answer without a score."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A point of a curve at which some prompts have no score.

    Attributes:
        defence: The model.
        attack: What was done to it.
        seed: Of the attack.
        step: Of the attack.
        metric: One of :data:`JUDGED`.
        unscored: Prompts without a score.
        prompts: All of them.
        value: The mean over the others; None if there is none.
        low: The mean if every missing score were 0.
        high: The same if every one were 1.
    """

    defence: str
    attack: str
    seed: int
    step: int
    metric: str
    unscored: int
    prompts: int
    value: float | None
    low: float
    high: float


def gaps(curves: Sequence[Curve], metrics: Sequence[str] = JUDGED) -> tuple[Gap, ...]:
    """Every point of the curves with an unscored prompt, metric by metric, in their order."""
    return tuple(gap for metric in metrics for curve in curves for gap in _gaps(curve, metric))


def widest(found: Sequence[Gap]) -> tuple[Gap, ...]:
    """Of each model and metric the gap that reaches highest; of equals the one with more unscored prompts."""
    most: dict[tuple[str, str], Gap] = {}
    for gap in found:
        key = (gap.defence, gap.metric)
        if key not in most or (gap.high, gap.unscored) > (most[key].high, most[key].unscored):
            most[key] = gap
    return tuple(most.values())


def sentences(curves: Sequence[Curve]) -> list[str]:
    """What the gaps mean, one sentence for each model and metric that has one."""
    said = []
    for gap in widest(gaps(curves)):
        mean = "no number" if gap.value is None else f"{gap.value:.2f} over the others"
        name = gap.metric.replace("_", " ")
        said.append(
            f"{gap.unscored} of {counted(gap.prompts, 'answer')} of {gap.defence} after {gap.attack}, step {gap.step}, "
            f"{verb(gap.unscored, 'has', 'have')} no score: a judge's reply could not be read or never came, or it had "
            f"nothing to compare with. There {name} is {mean}, and between {gap.low:.2f} and {gap.high:.2f} whatever "
            "they are. No mean counts them."
        )
    return said


def holed(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point in plain data; of its values per prompt only those of judged metrics in which one is missing."""
    rows = point.get("per_prompt") or {}
    kept = {metric: rows[metric] for metric in JUDGED if None in (rows.get(metric) or ())}
    light = {key: value for key, value in point.items() if key != "per_prompt"}
    return {**light, "per_prompt": kept} if kept else light


def _gaps(curve: Curve, metric: str) -> Iterator[Gap]:
    for point in curve.points:
        row = point.per_prompt.get(metric, ())
        known = [score for score in row if score is not None]
        missing = len(row) - len(known)
        if missing:
            yield Gap(
                defence=curve.defence,
                attack=curve.attack,
                seed=curve.seed,
                step=point.step,
                metric=metric,
                unscored=missing,
                prompts=len(row),
                value=sum(known) / len(known) if known else None,
                low=sum(known) / len(row),
                high=(sum(known) + missing) / len(row),
            )
