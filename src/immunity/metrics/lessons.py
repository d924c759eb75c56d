"""Benign training runs as they are read from plain rows, and the learning rate that is chosen without looking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from immunity.errors import DataError
from immunity.metrics.stats import finite, mean

ROLES: Final[Mapping[str, str]] = {"model": "model", "defended": "model", "baseline": "baseline"}


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One benign training run.

    Attributes:
        role: "model" (hardened) or "baseline".
        use: "search" (only for choosing a rate), "judge" (only for judging), "given" (judging, at a rate that other
            runs chose), or "" (both, by leaving seeds out).
        points: (step, accuracy), in the order of the steps.
        per_prompt: Scores of the last point; empty if they are not known.
        n_prompts: Behind each accuracy; 0 if not known.
    """

    task: str
    adapter: str
    lr: float
    seed: int
    role: str
    round: int
    use: str
    points: tuple[tuple[int, float], ...]
    diverged: bool
    per_prompt: tuple[float | None, ...]
    n_prompts: int

    @property
    def final(self) -> float:
        """Accuracy at the last step, also where it diverged: that is the model the user is left with."""
        known = [score for score in self.per_prompt if score is not None]
        return mean(known) if known else self.points[-1][1]

    @property
    def cell(self) -> tuple[str, str, int, float, int, str]:
        """What the same run on the other model has in common with it."""
        return (self.task, self.adapter, self.round, self.lr, self.seed, self.use)


class Chosen(NamedTuple):
    """Which rate judges each seed, and whether none of them was chosen on the seed itself."""

    rates: Mapping[int, float]
    blind: bool


def read(rows: Sequence[Mapping[str, Any]]) -> list[Lesson]:
    """The runs of :func:`immunity.metrics.trainability.trainability`'s rows.

    Raises:
        DataError: A row lacks a field, has no points, or an accuracy that is no share.
    """
    return [_lesson(row, i) for i, row in enumerate(rows)]


def best_rates(lessons: Sequence[Lesson]) -> Chosen:
    """For each judging seed of one model, the rate with the best mean final accuracy where it does not judge.

    Runs marked "search" (other seeds, or the same runs asked other prompts) choose for every seed; without them the
    other seeds choose for each. Of equal rates, the least. With one seed and nothing marked it must choose for itself,
    and that is said. Where all rates are given, there is nothing to choose.
    """
    if lessons and all(one.use == "given" for one in lessons):
        return Chosen({one.seed: one.lr for one in lessons}, True)
    search = [one for one in lessons if one.use == "search"]
    judges = sorted({one.seed for one in lessons if one.use != "search"})
    if search:
        seen = {(one.lr, one.seed, one.points) for one in search}
        twice = any((one.lr, one.seed, one.points) in seen for one in lessons if one.use != "search")
        return Chosen(dict.fromkeys(judges, _best(search)), not twice)
    if len({one.lr for one in lessons}) == 1:  # nothing was chosen
        return Chosen(dict.fromkeys(judges, lessons[0].lr), True)
    if len(judges) < 2:
        return Chosen(dict.fromkeys(judges, _best(lessons)) if judges else {}, False)
    return Chosen({seed: _best([one for one in lessons if one.seed != seed]) for seed in judges}, True)


def first_rates(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, int], float]:
    """The rate at which a first round is judged: (task, adapter, "model" or "baseline", seed) -> rate.

    Raises:
        DataError: See :func:`read`.
    """
    runs: dict[tuple[str, str, str], list[Lesson]] = {}
    for one in read(rows):
        if one.round == 1:
            runs.setdefault((one.task, one.adapter, one.role), []).append(one)
    return {(*key, seed): rate for key, mine in runs.items() for seed, rate in best_rates(mine).rates.items()}


def area(lesson: Lesson) -> float:
    """The mean accuracy over log(1 + steps), by trapezoids; the accuracy itself if there is one point."""
    places = [math.log1p(step) for step, _ in lesson.points]
    if places[-1] == places[0]:
        return lesson.points[-1][1]
    pairs = zip(places, places[1:], lesson.points, lesson.points[1:], strict=False)
    total = math.fsum((right - left) * 0.5 * (a + b) for left, right, (_, a), (_, b) in pairs)
    return total / (places[-1] - places[0])


def _best(lessons: Sequence[Lesson]) -> float:
    rates = sorted({one.lr for one in lessons})
    return max(rates, key=lambda lr: (mean([one.final for one in lessons if one.lr == lr]), -lr))


def _lesson(row: Mapping[str, Any], i: int) -> Lesson:
    where = f"benign run {i} ({row.get('task')!r}, {row.get('adapter')!r})"
    lacking = [key for key in ("task", "adapter", "lr", "seed", "model", "points") if row.get(key) is None]
    if lacking or row["model"] not in ROLES or not row["points"]:
        raise DataError(f"{where}: lacks {', '.join(lacking) or 'points, or its model is not model or baseline'}")
    points = tuple(sorted((int(step), float(accuracy)) for step, accuracy in row["points"]))
    if not all(0.0 <= accuracy <= 1.0 for _, accuracy in points):
        raise DataError(f"{where}: an accuracy is no share in [0, 1]; divide percentages by 100")
    use = str(row.get("use") or "")
    if use not in {"", "search", "judge", "given"}:
        raise DataError(f'{where}: use is {use!r}; use "search", "judge", "given", or leave it out')
    per_prompt = tuple(finite(score) for score in row.get("per_prompt") or ())
    return Lesson(
        task=str(row["task"]),
        adapter=str(row["adapter"]),
        lr=float(row["lr"]),
        seed=int(row["seed"]),
        role=ROLES[row["model"]],
        round=int(row.get("round") or 1),
        use=use,
        points=points,
        diverged=bool(row.get("diverged")),
        per_prompt=per_prompt,
        n_prompts=len(per_prompt) or int(row.get("n_prompts") or 0),
    )
