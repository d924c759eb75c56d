"""fit: the one training loop, for defences and attacks alike.

The data of a step and its random numbers are pure functions of (seed, step), so the state of a run is its weights, its
optimiser and its direction's own state; a killed run that is resumed ends with the same weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import nn

from immunity.batch import Batch
from immunity.errors import DivergedError, SettingsError
from immunity.keeper import Keeper, Stateful, stateful
from immunity.losses import check_head
from immunity.optimizers import OPTIMIZERS, Descent, Optimizer
from immunity.theta import Theta, Vector

Batches = Mapping[str, Batch]
"""Role -> the batch of this step."""
Direction = Callable[[Theta, Batches], Vector]
"""What to descend along: a gradient, made from as many gradients as it likes. One with a state of its own that is to be
saved and resumed with the run is a :class:`~immunity.keeper.Stateful`."""
Streams = Mapping[str, Callable[[int], Batch]]
"""Role -> (step -> batch), a pure function."""
Observe = Callable[[int, Mapping[str, float]], None]
"""(steps done, trace of the last step) -> None; called once before the first step and after each."""
Schedule = Literal["constant", "linear", "cosine", "sgdr"]

_COSTS: Final = frozenset({"save_every", "micro_batch"})
"""Settings that change what a run costs, never its result."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to descend.

    Attributes:
        steps: Optimiser steps.
        lr: Peak learning rate.
        optimizer: "adamw", "adam" (both β .9, .999), "sgd", "nesterov" (SGD with Nesterov's momentum), "adagrad",
            "adadelta" or "schedulefree" (Schedule-Free AdamW; needs ``immunity[search]``).
        momentum: Of SGD; above 0 for "nesterov".
        weight_decay: Decoupled for "adamw" and "schedulefree", added to the gradient for the others.
        clip: Largest global norm of the direction, None for no clipping.
        schedule: "constant", "linear" (to 0), "cosine" (to 0) or "sgdr" (``cycles`` cosines one after the other).
        cycles: Of "sgdr": how often the rate falls to 0; after each fall but the last it restarts at its peak.
        warmup: Share of the steps over which the rate rises from 0.
        micro_batch: Rows per forward pass; changes memory, never a result.
        autocast: "bf16" computes in bf16 over fp32 weights.
        seed: Of the order of data and of dropout.
        save_every: Steps between checkpoints when there is a folder.

    Raises:
        SettingsError: A setting is out of range.

    Source:
        "sgdr": Loshchilov and Hutter, arXiv 1608.03983, eq. 5, with cycles of equal length (T_mult = 1) and η_min = 0.
    """

    steps: int
    lr: float
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    schedule: Schedule = "constant"
    cycles: int = 4
    warmup: float = 0.0
    micro_batch: int | None = None
    autocast: Literal["no", "bf16"] = "no"
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        rules = {
            "steps": self.steps >= 1,
            "lr": math.isfinite(self.lr) and self.lr > 0,
            "optimizer": self.optimizer in OPTIMIZERS,
            "momentum": 0 <= self.momentum < 1 and (self.momentum > 0 or self.optimizer != "nesterov"),
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip is None or self.clip > 0,
            "schedule": self.schedule in {"constant", "linear", "cosine", "sgdr"},
            "cycles": self.cycles >= 1,
            "warmup": 0 <= self.warmup < 1,
            "micro_batch": self.micro_batch is None or self.micro_batch >= 1,
            "autocast": self.autocast in {"no", "bf16"},
            "seed": self.seed >= 0,
            "save_every": self.save_every >= 1,
        }
        for name, good in rules.items():
            if not good:
                raise SettingsError(f"{name} = {getattr(self, name)!r} is out of range: see the help of Fit.{name}")

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0): a pure function, so there is no scheduler state to save."""
        ramp = self.warmup * self.steps
        if step < ramp:
            return self.lr * (step + 1) / max(1.0, math.ceil(ramp))
        if self.schedule == "sgdr":
            first = math.ceil(ramp)  # whole numbers, so that a restart falls on a step
            span = max(1, self.steps - first)
            cycled = ((step - first) * min(self.cycles, span)) % span / span
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * cycled))
        done = (step - ramp) / max(1.0, self.steps - ramp)
        fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.lr * fall[self.schedule]


@final
class Training:
    """One training run, a step at a time: it asks for a direction and is told it.

    ``while not run.ended: batches = run.ask(); run.descend(lambda: direction(run.theta, batches))``. :func:`fit` drives
    one of them, a fleet several side by side. It restores its last checkpoint when it is made.

    Args:
        theta: What moves.
        streams: Role -> (step -> batch).
        how: Settings; ``micro_batch`` and ``autocast`` are the point's own business.
        state: Of the direction, saved and resumed with the run.
        folder: See :func:`fit`.
        observe: See :func:`fit`.
        identity: See :func:`fit`.

    Attributes:
        theta: As given.
        how: As given.
        done: Steps done.

    Raises:
        ResumeError: The folder holds a run with other settings.
        MissingExtraError: The optimiser's package is not installed.
    """

    def __init__(
        self,
        theta: Theta,
        streams: Streams,
        how: Fit,
        *,
        state: Stateful | None = None,
        folder: Path | None = None,
        observe: Observe | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.theta = theta
        self.how = how
        self.done = 0
        self._streams = streams
        self._state = state
        self._observe = observe
        self._descent = Descent(
            theta.parameters, how.optimizer, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
        )
        self._keeper: Keeper | None = None
        if folder is not None:
            settings = {name: value for name, value in asdict(how).items() if name not in _COSTS}
            self._keeper = Keeper(folder, {"fit": settings, **(identity or {})})
            self.done = self._keeper.restore(theta, self._descent, state)

    @property
    def ended(self) -> bool:
        """Whether every step is done."""
        return self.done >= self.how.steps

    def begin(self) -> None:
        """Tell the observer where the run starts, or goes on."""
        self._tell({})

    def ask(self) -> Batches:
        """The batches of the next step; torch's random numbers are set to those of the step."""
        torch.manual_seed(_mix(self.how.seed, self.done))
        self.theta.progress = self.done / self.how.steps
        return {role: stream(self.done) for role, stream in self._streams.items()}

    def descend(self, along: Callable[[], Vector]) -> None:
        """One step against what ``along`` gives: clip, step, log, save, tell the observer.

        Raises:
            DivergedError: ``along`` did, or its vector is NaN or infinite; the message names the step.
        """
        try:
            vector = along()
        except DivergedError as error:
            raise DivergedError(f"step {self.done + 1}: {error}") from error
        norm = vector.norm()
        if not math.isfinite(norm):
            raise DivergedError(
                f"step {self.done + 1}: the direction is NaN or infinite; lower lr or the simulated step"
            )
        if self.how.clip is not None and norm > self.how.clip:
            vector = vector * (self.how.clip / norm)
        lr = self.how.rate(self.done)
        self._descent.step(vector.tensors(), lr, vector.still)
        self.done += 1
        trace = {**self.theta.clear(), "direction_norm": norm, "lr": lr}
        if self._keeper is not None:
            self._keeper.log(self.done, trace)
            if self.done % self.how.save_every == 0 or self.ended:
                self._keeper.save(self.done, self.theta, self._descent, self._state)
        self._tell(trace)

    def settle(self) -> None:
        """Leave the weights as they were measured and saved; no further step may be taken."""
        self._descent.settle()

    def _tell(self, trace: Mapping[str, float]) -> None:
        if self._observe is not None:
            with self._descent.shown():
                self._observe(self.done, trace)


def fit(
    network: nn.Module,
    direction: Direction,
    streams: Streams,
    how: Fit,
    *,
    trainable: Mapping[str, nn.Parameter] | None = None,
    folder: Path | None = None,
    observe: Observe | None = None,
    token: Callable[[str], int] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Descend along ``direction`` for ``how.steps`` steps, in place.

    Args:
        network: Its trainable parameters move; everything else is left as found, the user's random state included.
        direction: Called once a step with the point and the batches; if it is
            :class:`~immunity.keeper.Stateful`, its state is saved.
        streams: One for each role that the direction reads.
        how: Settings.
        trainable: Which parameters move instead, by name (see :class:`~immunity.theta.Theta`).
        folder: Where checkpoints and ``metrics.jsonl`` go; a run that was killed goes on from its last checkpoint when
            it is started again with the same folder. None keeps nothing.
        observe: Told of every step.
        token: Resolves words for losses that need a token id.
        identity: What else makes this run this run (method, data fingerprints); resuming under another one is refused.

    Raises:
        ModelError: The losses' logits are not the model's own (see ``losses.check_head``).
        ResumeError: The folder holds a run with other settings.
        DivergedError: A loss or the direction is NaN or infinite; the message names the step.
        MissingExtraError: The optimiser's package is not installed.
    """
    theta = Theta(network, trainable=trainable, micro_batch=how.micro_batch, autocast=compute(how), token=token)
    state = stateful(direction)
    run = Training(theta, streams, how, state=state, folder=folder, observe=observe, identity=identity)
    with undisturbed(theta):
        try:
            if run.done == 0:
                check_losses(network, next(iter(streams.values()))(0))
            run.begin()
            while not run.ended:
                run.descend(partial(direction, theta, run.ask()))
        finally:
            run.settle()


@contextmanager
def undisturbed(theta: Theta) -> Iterator[None]:
    """Training mode and random numbers of its own inside the ``with``; modes and random state as found afterwards."""
    modes = [(module, module.training) for module in theta.network.modules()]
    device = theta.parameters[0].device
    theta.network.train()
    try:
        with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_losses(network: nn.Module, batch: Batch) -> None:
    """:func:`~immunity.losses.check_head`, without dropout, which would make any two passes differ."""
    network.eval()
    check_head(network, batch)
    network.train()


def compute(how: Fit) -> torch.dtype | None:
    """The dtype that ``how`` computes in, None for that of the weights."""
    return torch.bfloat16 if how.autocast == "bf16" else None


def _mix(seed: int, step: int) -> int:
    """One number from two, so that neighbouring seeds do not share random streams."""
    return (seed * 1_000_003 + step * 7_919 + 12_345) % 2**63
