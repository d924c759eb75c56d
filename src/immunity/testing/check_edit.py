"""Checks of an edit of weights: what it changes, that it repeats itself, and that it refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import torch

from immunity import spec
from immunity.errors import SettingsError
from immunity.fit import Fit
from immunity.method import Problem, Run, problems
from immunity.models import LanguageModel, LoRA, attach, save
from immunity.stored import Stored
from immunity.testing.watch import ContractError, bits, first_layer, made, mark, picture, require
from immunity.weight_edit import WeightEdit

FAMILIES: Final = ("llama", "gpt2")


@runtime_checkable
class Graded(Protocol):
    """An edit that says which of its settings is its strength: at 0 it changes nothing."""

    strength: ClassVar[str]


def changes_weights_alone(method: WeightEdit) -> None:
    """Weights change, finite; nothing else does, no forward pass is made, and it is told like a run of one step."""
    for family in FAMILIES:
        with _pair(method, family) as (edit, model):
            where = f"{type(method).__name__}.immunise on {family}"
            mark(model)
            found = problems(edit, model, {})
            require(not found, f"{where}: `problems` finds some: {'; '.join(map(str, found))}")
            before, seen = picture(model.network), _Seen()
            passes = _immunise(edit, model, seen)
            after = picture(model.network)
            moved = {what for what in {**before, **after} if before.get(what, ()) != after.get(what, ())}
            weights = {f"the weight {name}" for name, _ in model.network.named_parameters()}
            require(bool(moved), f"{where} changes no weight")
            require(moved <= weights, f"{where} does not leave as found: {', '.join(sorted(moved - weights)[:3])}")
            require(
                all(bool(p.isfinite().all()) for p in model.network.parameters()),
                f"{where} leaves weights that are not finite",
            )
            require(passes == 0, f"{where} makes {passes} forward passes: an edit computes with weights alone")
            require(seen.steps == [0, 1], f"{where} tells the steps {seen.steps} to its observer, not 0 and 1")


def repeats_its_edit(method: WeightEdit) -> None:
    """Twice from the same weights gives the same weights bit for bit; the user's random numbers stay as they are."""
    results = []
    for _ in range(2):
        with _pair(method) as (edit, model):
            state = torch.get_rng_state()
            _immunise(edit, model)
            require(
                torch.equal(state, torch.get_rng_state()),
                f"{type(method).__name__} draws from torch's global generator: use one of its own",
            )
            results.append(_weights(model))
    require(results[0] == results[1], f"{type(method).__name__} gives other weights when it is run again")


def at_strength_0_it_changes_nothing(method: WeightEdit) -> None:
    """With its strength at 0 it refuses, and what it would do is nothing, bit for bit."""
    name = type(method).__name__
    if not isinstance(method, Graded) or not method.strength:
        raise ContractError(f"{name}: write `strength: ClassVar[str] = …`, the setting that at 0 changes nothing")
    with _pair(spec.build(method, {method.strength: 0})) as (weak, model):
        where = [problem.where for problem in weak.problems(model)]
        require(method.strength in where, f"{name} with {method.strength} = 0: `problems` does not report it")
        before = _weights(model)
        with torch.no_grad():
            weak.edit(model, Stored(weak.base))
        require(_weights(model) == before, f"{name} with {method.strength} = 0 changes weights")


def refuses_before_it_edits(method: WeightEdit) -> None:
    """A base that nobody named, one that is missing, of another shape, or the same model; an adapter: all refused."""
    with _pair(method) as (edit, model):
        name, before = type(method).__name__, _weights(model)
        with TemporaryDirectory() as place:
            other, same = Path(place) / "other", Path(place) / "same"
            save(made("gpt2"), other)
            save(model, same)
            for what, base in {
                "no base": "",
                "a base that does not exist": f"{place}/missing",
                "a base of another architecture": str(other),
                "the model itself as base": str(same),
            }.items():
                _require_refused(spec.build(edit, {"base": base}), model, what, "base")
        require(_weights(model) == before, f"{name} edits weights before it refuses")
        found = edit.problems(attach(model, LoRA(r=2)))
        require(bool(found), f"{name} would edit the weights under an adapter: report it in `problems`")


def _require_refused(method: WeightEdit, model: LanguageModel, what: str, where: str) -> None:
    name = type(method).__name__
    found: list[Problem] = problems(method, model, {})
    require(
        where in [problem.where for problem in found], f"{name}, given {what}: `problems` does not report {where!r}"
    )
    try:
        _immunise(method, model)
    except SettingsError:
        return
    raise ContractError(f"{name}, given {what}, edits all the same")


class _Seen:
    """Observes a run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, done: int, trace: Mapping[str, float]) -> None:  # noqa: ARG002 - told of every step
        self.steps.append(done)


@contextmanager
def _pair(method: WeightEdit, family: str = "llama") -> Iterator[tuple[WeightEdit, LanguageModel]]:
    """The method with a base that it can have, and a model that was moved away from it in a few directions."""
    with TemporaryDirectory() as place:
        model = made(family)
        save(model, Path(place) / "base")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.network.parameters():
                p.requires_grad_(False)
                if p.ndim == 2:
                    u, v = (torch.randn(n, 3, generator=generator) for n in p.shape)
                    p.add_(0.02 * u @ v.T)
        yield spec.build(method, {"base": str(Path(place) / "base")}), model


def _immunise(method: WeightEdit, model: LanguageModel, seen: Any = None) -> int:  # noqa: ANN401 - an observer, or none
    """Run it; returns how many forward passes were made."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = first_layer(model.network).register_forward_pre_hook(count)
    try:
        method.immunise(model, {}, Run(fit=Fit(steps=1, lr=1.0), observe=seen))
    finally:
        hook.remove()
    return passes


def _weights(model: LanguageModel) -> list[bytes]:
    return [bits(p) for p in model.network.parameters()]
