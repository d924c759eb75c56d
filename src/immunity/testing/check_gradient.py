"""Checks of one direction: what a method's ``gradient`` does to the point it is given, and what it depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, Protocol, runtime_checkable

import torch

from immunity import spec
from immunity.batch import IGNORE, Tokens
from immunity.errors import DivergedError, PrecisionError, SettingsError
from immunity.losses import nll
from immunity.method import Descending, StatefulMethod, started
from immunity.testing import tiny
from immunity.testing.watch import (
    ContractError,
    InjectedError,
    Watched,
    at,
    batches,
    direction,
    equal,
    made,
    mark,
    picture,
    require,
    require_same,
    spied,
)
from immunity.theta import Theta, Vector

SAME: Final = 1e-6
"""Relative difference allowed between micro-batches and whole ones, in float64: finite differences included."""
SEVERAL: Final = 8
"""Steps in which a method that has a state must have come round to all that it reads, in turn or by drawing lots."""
DIFFERENT: Final = 1e-3
"""Relative difference from SFT's gradient below which a method is SFT."""


@runtime_checkable
class Graded(Protocol):
    """A method that says which of its settings is its strength: at 0 it is SFT. "" if it has none."""

    strength: ClassVar[str]


def leaves_everything_as_found(method: Descending) -> None:
    """After ``gradient``: weights bit for bit, ``.grad``, ``requires_grad``, hooks, modes; and it has come home."""
    model, name = made(), type(method).__name__
    mark(model)
    theta, before = at(model), picture(model.network)
    direction(started(method, model), theta, batches(method))
    require_same(before, model.network, f"{name}.gradient")
    theta.clear()
    theta.value(nll, tiny.batch(1))
    require(set(theta.trace) == {"nll/train"}, f"{name}.gradient ends away from home: Theta logs {set(theta.trace)}")


def survives_a_fault_at_every_call(method: Descending) -> None:
    """Whatever call into the algebra fails, and whatever forward pass: all is as found and the fault comes out."""
    model, name = made(), type(method).__name__
    mark(model)
    theta, data, first = at(model), batches(method), started(method, model)
    with spied(theta) as calls:
        direction(first, theta, data)
    require(bool(calls), f"{name}.gradient never calls its `theta`: no direction can come from elsewhere")
    before = picture(model.network)
    for i, call in enumerate(calls, start=1):
        where = f"{name}.gradient, after a fault in call {i} of {len(calls)}, {call.name}"
        try:
            along = started(method, model)
            with spied(theta, fail_at=i):
                direction(along, theta, data)
        except InjectedError:
            require_same(before, model.network, where)
        else:
            raise ContractError(f"{where}: it went on as if nothing had happened")


def repeats_itself(method: Descending) -> None:
    """The same call gives the same vector bit for bit, torch's random numbers being those of the step."""
    model, data = made(), batches(method)
    theta = at(model)
    first, second = (direction(started(method, model), theta, data) for _ in range(2))
    require(
        equal(first, second),
        f"{type(method).__name__}.gradient gives another vector when called again: random numbers come from torch "
        "(fit seeds them at every step), and nothing is kept between calls",
    )


def micro_batches_change_nothing(method: Descending) -> None:
    """In float64 the direction is the same whole and split; with a coupled loss a split is refused."""
    name, rows = type(method).__name__, 3
    model = tiny.language_model(tiny.gpt2(vocab=tiny.VOCAB))
    theta, data = at(model), batches(method, rows)
    with spied(theta) as calls:
        whole = direction(started(method, model), theta, data)
    coupled = sorted({call.loss.name for call in calls if call.loss is not None and call.loss.coupled})
    for size in (1, 2):
        try:
            split = direction(started(method, model), at(model, micro_batch=size), data)
        except SettingsError as error:
            if not coupled:
                raise ContractError(f"{name} has no coupled loss, yet refuses to be split: {error}") from error
            return
        off = (whole - split).norm() / whole.norm()
        require(
            off < SAME,
            f"{name}: micro-batches of {size} change the direction by {off:.1e} of its length. A loss gives one value "
            "for each example and only Theta averages; one that couples examples says coupled=True",
        )


def reads_what_it_declares(method: Descending) -> None:
    """No other role is looked for, and every row of every declared one reaches a loss, or the model's answer to it."""
    name = type(method).__name__
    model, data = made(), Watched(batches(method), name)
    theta, along = at(model), started(method, model)
    with spied(theta) as calls:
        for step in range(SEVERAL if isinstance(method, StatefulMethod) else 1):
            direction(along, theta, data, step)
    idle = sorted(set(data) - data.read)
    require(not idle, f"{name} declares the role {', '.join(idle)} but never reads it")
    rows = [row for call in calls if call.batch is not None for row in call.batch.rows]
    met, asked = {row.ids for row in rows}, {_prompt(row) for row in rows}
    for role in data:
        unused = sum(row.ids not in met and _prompt(row) not in asked for row in data[role].rows)
        handed = len(data[role])
        require(
            unused == 0,
            f"{name} declares {method.reads[role]} batches of {role!r}; of their {handed} rows {unused} reach no loss",
        )


def is_not_sft(method: Descending) -> None:
    """The direction differs from SFT's, whichever way tokens are averaged; a baseline is exempt."""
    if method.card.block == "baseline":
        return
    model, data = made(), batches(method)
    theta = at(model)
    found = direction(started(method, model), theta, data)
    for mean, plain in _sft(method, theta):
        off = (found - plain).norm() / plain.norm()
        require(
            off > DIFFERENT,
            f"{type(method).__name__} differs from SFT (mean per {mean}) by {off:.1e} of its gradient: it does nothing",
        )


def at_strength_0_it_is_sft(method: Descending) -> None:
    """With its strength at 0 the direction is SFT's, bit for bit, and ``problems`` says so; a baseline is exempt."""
    name = type(method).__name__
    if method.card.block == "baseline":
        return
    if not isinstance(method, Graded):
        raise ContractError(
            f"{name}: write `strength: ClassVar[str] = …`, the setting that at 0 makes it SFT, '' if none"
        )
    if not method.strength:
        return
    weak, model = spec.build(method, {method.strength: 0}), made()
    theta = at(model)
    found = direction(started(weak, model), theta, batches(weak))
    require(
        any(equal(found, plain) for _, plain in _sft(weak, theta)),
        f"{name} with {method.strength} = 0 is not SFT, bit for bit",
    )
    require(
        method.strength in [problem.where for problem in weak.problems(model)],
        f"{name} with {method.strength} = 0 is SFT, but `problems` does not report {method.strength!r}",
    )


def is_finite_in_fp32_and_bf16(method: Descending) -> None:
    """Finite fp32 vectors, computed in fp32 and in bf16; who takes differences of gradients may refuse bf16."""
    name, model, data = type(method).__name__, made(), batches(method)
    theta = at(model)
    with spied(theta) as calls:
        _require_finite(name, "fp32", theta, direction(started(method, model), theta, data))
    theta = at(model, autocast=torch.bfloat16)
    try:
        found = direction(started(method, model), theta, data)
    except PrecisionError as error:
        differences = any(call.name == "hvp" for call in calls)
        require(differences, f"{name} takes no difference of gradients, yet refuses bf16: {error}")
        return
    _require_finite(name, "bf16", theta, found)


def nan_is_refused(method: Descending) -> None:
    """With a NaN in the weights, a DivergedError; and all is as found."""
    model, name = made(), type(method).__name__
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    before = picture(model.network)
    try:
        direction(started(method, model), at(model), batches(method))
    except DivergedError:
        require_same(before, model.network, f"{name}.gradient, after a DivergedError")
    else:
        raise ContractError(f"{name}.gradient goes on with NaN in the weights: let Theta's DivergedError come out")


def _prompt(row: Tokens) -> tuple[int, ...]:
    """What an answer to this row's prompt begins with."""
    return row.ids[: next((t for t, label in enumerate(row.labels) if label != IGNORE), len(row.ids))]


def _sft(method: Descending, theta: Theta) -> Iterator[tuple[str, Vector]]:
    if "alignment" in method.reads:
        rows = batches(method)["alignment"]
        yield "example", theta.grad(nll, rows)
        yield "token", theta.grad(nll, rows.by_tokens())


def _require_finite(name: str, dtype: str, theta: Theta, found: Vector) -> None:
    tensors = found.tensors()
    require(
        [t.shape for t in tensors] == [p.shape for p in theta.parameters],
        f"{name}.gradient, computed in {dtype}, does not have the shapes of the trainable weights",
    )
    low = {t.dtype for t in tensors} - {torch.float32}
    require(not low, f"{name}.gradient, computed in {dtype}, has entries of {low}: directions are fp32")
    require(all(bool(t.isfinite().all()) for t in tensors), f"{name}.gradient, computed in {dtype}, is not finite")
