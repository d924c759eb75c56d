"""Curve: what was measured along an attack, and the Recorder that measures it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from immunity.errors import DivergedError, SettingsError
from immunity.fit import Observe
from immunity.models import LanguageModel


class Measured(Protocol):
    """What a measure says about a model at one point (see ``immunity.measure.suite.Measurement``)."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Name -> number."""

    @property
    def per_prompt(self) -> Mapping[str, Sequence[float | None]]:
        """Name -> one value per prompt."""

    @property
    def n_prompts(self) -> Mapping[str, int]:
        """Kind -> number of prompts."""

    @property
    def samples(self) -> Sequence[Mapping[str, str]]:
        """Answers to look at."""


Measure = Callable[[LanguageModel], Measured]


@dataclass(frozen=True)
class Spent:
    """What an attack has cost so far.

    Attributes:
        examples: Training examples seen, repeats included.
        tokens: Of them, prompts included, pads not.
        flops: Floating-point operations of training, as 6 N per token for every weight and 4 N for an adapter on N.
    """

    examples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.examples + other.examples, self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True)
class Point:
    """The attacked model after ``step`` units of the attack.

    Attributes:
        step: Of what the attack counts in (``Attack.unit``): optimiser steps, directions, per cent …
        examples: Training examples seen, repeats included.
        seconds: Spent attacking since the start, without the measuring; over a resumed run, of all its parts.
        metrics: Name -> number.
        n_prompts: Kind -> prompts behind the shares in ``metrics``.
        samples: Answers to look at.
        per_prompt: Name -> one value per prompt.
        tokens: See :class:`Spent`.
        flops: See :class:`Spent`.
    """

    step: int
    examples: int
    seconds: float
    metrics: Mapping[str, float]
    n_prompts: Mapping[str, int]
    samples: Sequence[Mapping[str, str]]
    per_prompt: Mapping[str, Sequence[float | None]]
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One attack: its points in order of budget.

    Attributes:
        points: What was measured.
        ended: Why there are fewer of them than were planned ("diverged: …"), or "" if it is whole.
    """

    points: Sequence[Point]
    ended: str = ""


Enough = Callable[[Point], bool]
"""Whether an attack may end at this point: what it was made to show is shown."""


class EnoughSeenError(Exception):
    """Ends an attack early; caught where the attack was started, never shown."""


def budgets(steps: int) -> tuple[int, ...]:
    """Log-spaced numbers of steps at which a curve is measured: 0, 1, 2, 3, 5, 10, 20, 30, 50, 100, … and ``steps``."""
    found, scale = [0], 1
    while scale <= steps:
        found += [m * scale for m in (1, 2, 3, 5) if m * scale < steps]
        scale *= 10
    return (*found, steps)


def thinned(at: tuple[int, ...], most: int | None) -> tuple[int, ...]:
    """At most so many of these budgets, the first and the last among them, evenly over the others; None keeps all.

    Raises:
        SettingsError: ``most`` leaves no room for the first and the last.
    """
    if most is not None and most < 2:
        raise SettingsError(f"looks = {most}: the model as released and the end of an attack are two")
    if most is None or len(at) <= most:
        return at
    return tuple(at[round(i * (len(at) - 1) / (most - 1))] for i in range(most))


def as_json(point: Point) -> dict[str, Any]:
    """A point as plain data."""
    return {
        **asdict(replace(point, metrics={}, n_prompts={}, samples=(), per_prompt={})),
        "metrics": dict(point.metrics),
        "n_prompts": dict(point.n_prompts),
        "samples": [dict(sample) for sample in point.samples],
        "per_prompt": {name: list(values) for name, values in point.per_prompt.items()},
    }


@dataclass(kw_only=True)
class Recorder:
    """Measures an attack at each budget, and keeps the points on disk so that a resumed run goes on from them.

    Attributes:
        measure: Called at each budget.
        at: Budgets.
        folder: Where ``points.jsonl`` and checkpoints go; None keeps nothing.
        then: Told of every unit of the attack.
        enough: Asked at every point.
        points: What was measured so far.
    """

    measure: Measure
    at: tuple[int, ...]
    folder: Path | None = None
    then: Observe | None = None
    enough: Enough | None = None
    points: list[Point] = field(default_factory=list)
    _cost: Callable[[], Spent] = Spent
    _worked: float = 0.0
    _since: float | None = None
    _read: bool = False

    @property
    def spent(self) -> Spent:
        """What the attack has cost when it last told."""
        return self._cost()

    def follow(self, model: LanguageModel, spent: Callable[[int], Spent]) -> Observe:
        """An observer for :func:`immunity.fit.fit`, which trains ``model``.

        Args:
            model: What is measured.
            spent: Steps done -> their cost; a pure function, so that a resumed run knows what it had cost.
        """

        def told(done: int, trace: Mapping[str, float]) -> None:
            self._tell(done, model, lambda: spent(done), trace)

        return told

    def reached(
        self, step: int, model: LanguageModel, spent: Spent | None = None, trace: Mapping[str, float] | None = None
    ) -> None:
        """The attack is at ``step`` of its units; it is measured there if that is a budget.

        Args:
            step: Of the attack's unit; the first is 0.
            model: As it is now.
            spent: So far.
            trace: Numbers to show beside the progress.
        """
        self._tell(step, model, lambda: spent or Spent(), trace or {}, redone=True)

    def charge(self, seconds: float) -> None:
        """Count ``seconds`` of work in the place of the time since it was last told, when others worked too."""
        self._worked += seconds
        self._since = None

    def _tell(
        self,
        done: int,
        model: LanguageModel,
        spent: Callable[[], Spent],
        trace: Mapping[str, float],
        *,
        redone: bool = False,
    ) -> None:
        self._cost = spent
        if not self._read:
            self._take_up(None if redone else done)
        elif self._since is not None:
            self._worked += time.perf_counter() - self._since
        known = [point for point in self.points if point.step == done]
        if not known and done in self.at:
            known = [self._measure(done, model, spent())]
        if self.then is not None:
            self.then(done, trace)
        if known and self.enough is not None and self.enough(known[0]):
            raise EnoughSeenError
        self._since = time.perf_counter()

    def _take_up(self, done: int | None) -> None:
        """Keep the points that a killed run had measured, up to the checkpoint that it goes on from."""
        self._read = True
        path = self._file()
        if path is None or not path.exists():
            return
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        found = [Point(**json.loads(line)) for line in whole]
        self.points = [point for point in found if done is None or point.step <= done]
        self._worked = self.points[-1].seconds if self.points and done is not None else 0.0
        path.write_text("".join(json.dumps(as_json(point)) + "\n" for point in self.points))

    def _measure(self, done: int, model: LanguageModel, spent: Spent) -> Point:
        seen = self.measure(model)
        point = Point(
            step=done,
            examples=spent.examples,
            seconds=round(self._worked, 3),
            metrics=dict(seen.metrics),
            n_prompts=dict(seen.n_prompts),
            samples=[dict(sample) for sample in seen.samples],
            per_prompt={name: list(values) for name, values in seen.per_prompt.items()},
            tokens=spent.tokens,
            flops=spent.flops,
        )
        self.points.append(point)
        path = self._file()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(as_json(point)) + "\n")
        return point

    def _file(self) -> Path | None:
        return None if self.folder is None else self.folder / "points.jsonl"


def recorded(recorder: Recorder, attack: Callable[[], object]) -> Curve:
    """Do an attack; a model that diverges, or enough seen, ends its curve early and says why."""
    ended = ""
    try:
        attack()
    except DivergedError as error:
        ended = f"diverged: {error}"
    except EnoughSeenError:
        ended = "broken: nothing is left to show"
    return Curve(tuple(recorder.points), ended)
