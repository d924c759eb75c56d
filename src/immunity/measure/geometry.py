"""The geometry of the losses around a model: along rays from its weights, and along the paths that training takes.

A diagnostic, never a claim. ℓ_collapse FALLS where a trap fires. Rays go the same Euclidean distances in every
direction, over all weights together: a simulated attacker's step is a distance of that kind. So random directions are
plain (isotropic) and not normalised filter by filter, which serves to compare networks whose scales differ; here both
models come from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np
import torch

from immunity.batch import Batch
from immunity.data.streams import Shuffled, TokenSet
from immunity.errors import DataError, DivergedError, SettingsError
from immunity.losses import causal_lm, nll
from immunity.measure.collapse import collapse_set
from immunity.measure.loss import per_example
from immunity.models import LanguageModel
from immunity.simulated import walker
from immunity.theta import Theta, Vector

LOSSES: Final = ("collapse", "harmful", "general", "benign")
"""What is measured at every point: ℓ_collapse on general text, and the negative log-likelihood of three kinds."""
RAYS: Final[Mapping[str, tuple[str, Literal["normalised", "adam"]]]] = {
    "harmful": ("harmful", "normalised"),
    "benign": ("benign", "normalised"),
    "harmful-adam": ("harmful", "adam"),
    "benign-adam": ("benign", "adam"),
}
"""Direction -> the role whose gradient is descended, and how; "random" is besides."""
RANDOM: Final = "random"
PATHS: Final[Mapping[str, str]] = {"harmful-path": "harmful", "benign-path": "benign"}
DISTANCES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
_DIFFERENCE: Final = 0.1
"""Distance over which a gradient changes noticeably, for curvature (see :meth:`immunity.theta.Theta.hvp`)."""

Point: TypeAlias = "dict[str, float | None]"
"""A distance and the losses there."""
Tell = Callable[[Mapping[str, float]], None]
"""Told of the losses at every point."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is looked at.

    Attributes:
        distances: From the model's weights, rising, without 0, which is always measured.
        both_signs: Also go the other way, uphill in the losses whose gradients are taken.
        draws: How many batches each gradient is taken over, one after the other, and how many random directions.
        rows: Of a batch.
        measured: Held-out rows of each kind at most.
        path_steps: Steps of a path along which the gradient is taken anew; 0 leaves paths out.
        path_step: Length of each.
        path_rule: "normalised" or "adam": how its steps follow from gradients.
        seed: Of batches and random directions.
        micro_batch: Rows per pass of a gradient; changes no number but by rounding.

    Raises:
        SettingsError: A number is out of range.
    """

    distances: tuple[float, ...] = DISTANCES
    both_signs: bool = False
    draws: int = 3
    rows: int = 16
    measured: int = 12
    path_steps: int = 8
    path_step: float = 0.1
    path_rule: Literal["normalised", "adam"] = "normalised"
    seed: int = 0
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.distances), self.distances, strict=False))
        if not self.distances or not rising or not math.isfinite(self.distances[-1]):
            raise SettingsError(f"distances = {self.distances}: give positive numbers, each greater than the last")
        if min(self.draws, self.rows, self.measured) < 1 or self.seed < 0 or self.path_steps < 0:
            raise SettingsError(
                f"draws = {self.draws}, rows = {self.rows} and measured = {self.measured} begin at 1; "
                f"seed = {self.seed} and path_steps = {self.path_steps} at 0"
            )
        if not 0.0 < self.path_step < math.inf or self.path_rule not in ("normalised", "adam"):
            raise SettingsError(
                f"path_step = {self.path_step} is a positive distance, and path_rule = {self.path_rule!r} normalised "
                "or adam"
            )

    @property
    def places(self) -> tuple[float, ...]:
        """Where a ray is measured, without 0."""
        return (*(-d for d in reversed(self.distances)), *self.distances) if self.both_signs else self.distances

    def looks(self, *, benign: bool) -> int:
        """How many points are measured, with or without benign data to follow; the model's own is the first."""
        rays = 1 + (len(RAYS) if benign else 2)
        paths = len(PATHS) if benign else 1
        return 1 + self.draws * (rays * len(self.places) + paths * self.path_steps)


def probed(
    model: LanguageModel,
    data: Mapping[str, TokenSet],
    held_out: Mapping[str, TokenSet],
    how: Probe,
    *,
    word: str,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Losses around a model, and what its gradients are like, as plain data.

    Args:
        model: Every weight (or what else is to be moved) is trainable. It is as it was afterwards, bit for bit.
        data: Role -> what directions come from: "harmful", and "benign" and "general" where they are at hand.
        held_out: The same -> what is measured, "general" (which is also what collapses) among them.
        how: Where.
        word: What a trapped model says.
        tell: Told of every point.

    Returns:
        * "chance": ln V, the ℓ_collapse of a model that knows nothing.
        * "curves": direction, draw and points: "distance", the losses there (None where they are not finite, which is
          the last point of a path), and for a path, whose distance is what was walked, "away" from the model.
        * "draws": of each batch the norms of the gradients ("norms"), their cosines ("cosines", "harmful benign"),
          curvatures uᵀHu of a loss along its own unit gradient u ("curvature"), and the losses ("losses").

    Raises:
        DataError: There is nothing harmful to take a direction from, or no general text to measure.
        DivergedError: A loss is not finite at the model itself.
        ModelError: The tokenizer has no token for ``word``.
        SettingsError: There is no word.

    Departures from the definitions:
        Gradients are of the whole model's weights; an attacker who trains an adapter walks another way. The held-out
        rows are the same at every point and in every draw, so draws differ in the rows of their gradients only.
    """
    if "harmful" not in data or "general" not in held_out:
        raise DataError("a probe needs harmful rows to take directions from, and held-out general text")
    if not word:
        raise SettingsError("a probe needs the word that a trapped model says")
    theta = Theta(model.network, micro_batch=how.micro_batch)
    return _Around(model, theta, data, held_out, how, word, tell).everything()


@final
@dataclass(frozen=True)
class _Around:
    """What is done from the model's own weights, and back. See :func:`probed`."""

    model: LanguageModel
    theta: Theta
    data: Mapping[str, TokenSet]
    held_out: Mapping[str, TokenSet]
    how: Probe
    word: str
    tell: Tell

    def everything(self) -> dict[str, Any]:
        home = self.losses()
        if any(value is None for value in home.values()):
            raise DivergedError(f"a loss of {self.model.source!r} is not finite before it is moved: {home}")
        curves: list[dict[str, Any]] = []
        draws = []
        for draw in range(self.how.draws):
            batches = {role: self.batch(role, draw) for role in self.data}
            grads = {role: self.theta.grad(nll, batch) for role, batch in batches.items()}
            draws.append({"draw": draw, **self.numbers(batches, grads)})
            grads.pop("general", None)
            for name, direction in self.rays(grads, draw):
                curves.append({"direction": name, "draw": draw, "points": [{"distance": 0.0, **home}]})
                curves[-1]["points"] += self.ray(direction)
                curves[-1]["points"].sort(key=lambda point: point["distance"])
            for name, role in PATHS.items():
                if role in self.data and self.how.path_steps:
                    start = {"distance": 0.0, "away": 0.0, **home}
                    curves.append({"direction": name, "draw": draw, "points": [start, *self.path(role, draw)]})
        vocabulary = causal_lm(self.model.network).config.get_text_config().vocab_size
        return {"word": self.word, "chance": math.log(vocabulary), "curves": curves, "draws": draws}

    def batch(self, role: str, draw: int, seed: int = 0) -> Batch:
        return Shuffled(self.data[role], self.how.rows, self.how.seed + seed)(draw)

    def losses(self) -> Point:
        """All losses where the weights are now; None for what is not finite."""
        found: Point = {}
        for role, tokens in self.held_out.items():
            found |= self.loss(role, tokens)
        self.tell({f"{name}/held-out": value for name, value in found.items() if value is not None})
        return {name: found[name] for name in LOSSES if name in found}

    def loss(self, role: str, tokens: TokenSet) -> Point:
        """The losses on one kind of rows."""
        try:
            if role != "general":
                return {role: fmean(per_example(self.model, tokens, nll))}
            shape = collapse_set(self.model, tokens, word=self.word).metrics
            return {"collapse": shape["collapse_loss"], "general": shape["general_loss"]}
        except DivergedError:
            return dict.fromkeys(("collapse", "general") if role == "general" else (role,))

    def numbers(self, batches: Mapping[str, Batch], grads: Mapping[str, Vector]) -> dict[str, Any]:
        """What the gradients of a draw are like; nothing is said of the direction of one that is 0."""
        losses = {role: self.theta.trace[f"nll/{batch.role}"] for role, batch in batches.items()}
        units = {role: (1.0 / norm) * g for role, g in grads.items() if (norm := g.norm()) > 0.0}
        pairs = (("harmful", "benign"), ("harmful", "general"), ("benign", "general"))
        return {
            "losses": losses,
            "norms": {role: g.norm() for role, g in grads.items()},
            "cosines": {f"{a} {b}": units[a] @ units[b] for a, b in pairs if a in units and b in units},
            "curvature": {
                role: units[role] @ self.theta.hvp(nll, batches[role], units[role], scale=_DIFFERENCE)
                for role in ("harmful", "benign")
                if role in units
            },
        }

    def rays(self, grads: Mapping[str, Vector], draw: int) -> Iterator[tuple[str, Vector]]:
        """The directions of a draw, each a step of length 1, one at a time for memory's sake."""
        for name, (role, rule) in RAYS.items():
            if role in grads:
                yield name, walker(rule, 1.0)(grads[role])
        yield RANDOM, self.noise(draw)

    def noise(self, draw: int) -> Vector:
        """A random direction of length 1; the same on every device."""
        seed = int(np.random.SeedSequence([self.how.seed, draw]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(p.shape, generator=generator).to(p) for p in self.theta.parameters]
        return Vector(parts).unit()

    def ray(self, direction: Vector) -> list[Point]:
        found: list[Point] = []
        for distance in self.how.places:
            with self.theta.moved(distance * direction):
                found.append({"distance": distance, **self.losses()})
        return found

    def path(self, role: str, draw: int) -> list[Point]:
        """A fine-tuning of few steps, a fresh batch for each; it ends early where there is no gradient any more."""
        found: list[Point] = []
        how, away = self.how, None
        follow = walker(how.path_rule, how.path_step)
        with self.theta.excursion():
            for k in range(how.path_steps):
                g = self.gradient(self.batch(role, draw * how.path_steps + k, seed=1))
                if g is None:
                    break
                step = follow(g)
                self.theta.step(step)
                away = step if away is None else away + step
                found.append({"distance": round((k + 1) * how.path_step, 9), "away": away.norm(), **self.losses()})
        return found

    def gradient(self, batch: Batch) -> Vector | None:
        """None where the loss is not finite."""
        try:
            return self.theta.grad(nll, batch)
        except DivergedError:
            return None
