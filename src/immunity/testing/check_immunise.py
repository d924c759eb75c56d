"""Checks of whole runs, tiny ones: ``immunise`` on two families, resuming, and refusing before compute is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from torch import nn

from immunity.data.corpus import Corpora, Corpus
from immunity.errors import SettingsError
from immunity.fit import Fit, Observe
from immunity.method import Method, Run, problems
from immunity.models import LanguageModel
from immunity.testing.watch import (
    ContractError,
    InjectedError,
    Watched,
    bits,
    corpus,
    first_layer,
    made,
    mark,
    picture,
    require,
)

STEPS: Final = 4
KILLED_AFTER: Final = 2
DERIVED: Final = frozenset({"heldout"})
"""Roles that are made of others where nobody gives them (``data.dealt``)."""
KINDS: Final = (
    ("llama", "full", "chat"),
    ("llama", "lora", "alpaca"),
    ("gpt2", "lora", "chat"),
    ("gpt2", "full", "alpaca"),
)
"""Family, what trains, template: every pair of values occurs once."""


class _Log:
    """Observes a run, and cuts it off after some step."""

    def __init__(self, cut_after: int | None = None) -> None:
        self.seen: dict[int, dict[str, float]] = {}
        self._cut_after = cut_after

    def __call__(self, done: int, trace: Mapping[str, float]) -> None:
        self.seen[done] = dict(trace)
        if done == self._cut_after:
            raise InjectedError(f"injected after step {done}")


def immunises(method: Method, family: str, trains: str, template: str) -> None:
    """Two steps move trainable weights and nothing else; they stay finite, and modes and ``.grad`` are as found."""
    model = made(family, trains, template)
    where = f"{type(method).__name__}.immunise on {family}, {trains}, {template} prompts"
    mark(model)
    data = _data(method)
    found = problems(method, model, data)
    require(not found, f"{where}: `problems` finds some: {'; '.join(map(str, found))}")
    before, trained = picture(model.network), _trained(model.network)
    data = _data(method)  # a fresh one: `problems` may have looked into the other
    method.immunise(model, data, _run(steps=2))
    idle = sorted(set(method.reads) - data.read)
    require(not idle, f"{where} never reads the role {', '.join(idle)} that it declares")
    require(
        all(bool(p.isfinite().all()) for p in model.network.parameters()), f"{where} leaves weights that are not finite"
    )
    after = picture(model.network)
    moved = {what for what in {**before, **after} if before.get(what, ()) != after.get(what, ())}
    require(bool(moved & trained), f"{where} moves no trainable weight")
    require(
        moved <= trained, f"{where} changes what it should leave as found: {', '.join(sorted(moved - trained)[:3])}"
    )


def resumes_bit_for_bit(method: Method) -> None:
    """A run that is cut off after two steps of four and started again ends with the weights and log of a whole one."""
    name, log, cut, rest = type(method).__name__, _Log(), _Log(cut_after=KILLED_AFTER), _Log()
    with TemporaryDirectory() as place:
        whole, broken = Path(place) / "whole", Path(place) / "broken"
        straight = _weights_after(method, whole, log)
        with suppress(InjectedError):
            _weights_after(method, broken, cut)
        again = _weights_after(method, broken, rest)
    first = min((step for step in rest.seen if rest.seen[step]), default=0)
    require(
        not cut.seen or first == KILLED_AFTER + 1,
        f"{name}: cut off after step {KILLED_AFTER} with save_every=1 it goes on with step {first}",
    )
    require(again == straight, f"{name}: a run that was cut off and resumed ends with other weights than a whole one")
    joined = {**cut.seen, **{step: row for step, row in rest.seen.items() if row}}
    require(joined == log.seen, f"{name}: a run that was cut off and resumed logs other numbers than a whole one")
    require(
        all(math.isfinite(value) for row in log.seen.values() for value in row.values()),
        f"{name} logs numbers that are not finite",
    )


def problems_come_before_compute(method: Method) -> None:
    """Every missing role and a frozen model are reported, all at once; ``immunise`` refuses them without computing."""
    model, name = made(), type(method).__name__
    model.network.requires_grad_(False)
    found = [problem.where for problem in problems(method, model, {})]
    wanted = [role for role in method.reads if role not in DERIVED]
    silent = sorted({"model", *method.reads} - set(found))
    require(
        not silent, f"{name}: without data and with nothing trainable, `problems` does not report {', '.join(silent)}"
    )
    model = made()
    for missing in wanted:
        data = {role: corpus(role) for role in method.reads if role != missing}
        _require_refused(method, model, data, missing)


def _require_refused(method: Method, model: LanguageModel, data: Corpora, missing: str) -> None:
    name, passes = type(method).__name__, 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = first_layer(model.network).register_forward_pre_hook(count)
    try:
        method.immunise(model, data, _run(steps=1))
    except SettingsError as error:
        require(missing in str(error), f"{name}: without {missing!r} its error does not name that role: {error}")
    except KeyError as error:
        raise ContractError(
            f"{name}: without {missing!r} it fails on a look-up: call refuse(problems(...)) first"
        ) from error
    else:
        raise ContractError(f"{name}: without data for {missing!r} it trains all the same")
    finally:
        hook.remove()
    require(passes == 0, f"{name}: it computes ({passes} forward passes) before it says that {missing!r} is missing")


def _data(method: Method) -> Watched[Corpus | tuple[Corpus, ...]]:
    """The declared roles and no other; the alignment data are two corpora that share each batch."""
    data: dict[str, Corpus | tuple[Corpus, ...]] = {role: corpus(role) for role in method.reads}
    if "alignment" in data:
        data["alignment"] = (corpus("alignment"), corpus("general", 30).as_role("alignment"))
    return Watched(data, f"{type(method).__name__}.immunise")


def _run(steps: int, folder: Path | None = None, observe: Observe | None = None) -> Run:
    how = Fit(steps=steps, lr=1e-2, save_every=1)
    return Run(fit=how, default_batch_size=3, folder=folder, observe=observe)


def _weights_after(method: Method, folder: Path, log: _Log) -> list[bytes]:
    model = made()
    method.immunise(model, _data(method), _run(STEPS, folder, log))
    return [bits(p) for p in model.network.parameters()]


def _trained(network: nn.Module) -> set[str]:
    return {f"the weight {name}" for name, p in network.named_parameters() if p.requires_grad}
