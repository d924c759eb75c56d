"""One attack on one or several models: run it, show its curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunity.cli.console import bars, exit_code, failures, out
from immunity.cli.tables import curve_table, data_table, show

if TYPE_CHECKING:
    from immunity.attacks.attack import Attack, Opening
    from immunity.bench.assault import Assault
    from immunity.bench.hardened import Hardened
    from immunity.data.corpus import Corpora
    from immunity.measure.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Task:
    """What single attacks and batteries have in common.

    Attributes:
        models: The model under attack, then the baselines.
        known: What their records say.
        data: What the attacker has.
        suite: What is measured.
        opening: How the first model is opened; the others alike.
        folder: Where everything goes.
        workers: Attacks side by side.
        seeds: Of the attack; empty for its own.
        looks: Most budgets at which an attack is measured; None for all of its own.
    """

    models: tuple[str, ...]
    known: tuple[Hardened, ...]
    data: Corpora
    suite: Suite
    opening: Opening
    folder: Path
    workers: int
    seeds: tuple[int, ...]
    looks: int | None = None

    @property
    def threads(self) -> int:
        """Torch threads of each attack."""
        from immunity.bench import pool
        from immunity.bench.hardened import origin

        # The tiny model is so small that threads would only wait for one another.
        return 1 if origin(self.models[0]) == "tiny" else max(1, pool.cores() // self.workers)


def run(task: Task, name: str, preset: str, words: list[str]) -> int:
    """Run the attack called ``name`` on every model with every seed; the exit code.

    Raises:
        SettingsError: There is no such attack, preset or setting.
        DataError: The attacker lacks data.
        ResumeError: The folder holds other curves.
    """
    from immunity.bench import assault, pool
    from immunity.spec import build

    chosen = _attack(name, preset, words)
    _enough(chosen, task.data)
    label = preset if name == "finetune" else name if preset == "default" else f"{name} {preset}"
    todo = [
        assault.Assault(
            name=label,
            defence=source,
            attack=build(chosen, {"seed": seed}),
            opening=replace(task.opening, source=source),
            data=task.data,
            suite=task.suite,
            folder=task.folder / f"{i}-seed{seed}",
            looks=task.looks,
        )
        for i, source in enumerate(task.models)
        for seed in task.seeds or (chosen.seed,)
    ]
    _refuse_other(task.folder, todo)
    assault.check(todo)
    began = time.monotonic()
    with bars(todo, [1.0] * len(todo)) as shown:
        outcomes = pool.run(todo, workers=task.workers, threads=task.threads, progress=shown)
    records = [outcome.record for outcome in outcomes if outcome.record is not None]
    if records:
        _show(records, task, time.monotonic() - began)
    failures(outcomes)
    return exit_code(outcomes)


def _attack(name: str, preset: str, words: list[str]) -> Attack:
    from immunity.attacks import PRESETS
    from immunity.errors import SettingsError
    from immunity.spec import build, nearest, pairs

    if name not in PRESETS:
        raise SettingsError(f"no attack is called {name!r}{nearest(name, PRESETS)}")
    if preset not in PRESETS[name]:
        raise SettingsError(f"no attack preset {preset!r}{nearest(preset, PRESETS[name])}")
    return build(PRESETS[name][preset], pairs(words))


def _enough(chosen: Attack, data: Corpora) -> None:
    """The rows that the attack reads must be there; said before a model is opened."""
    from immunity.errors import DataError

    try:
        chosen.reads(data)
    except DataError as error:
        raise DataError(f"{error} (--set n=… changes how many rows the attack takes)") from error


def _refuse_other(folder: Path, todo: Sequence[Assault]) -> None:
    """A folder's result is not replaced by one that knows less.

    Raises:
        ResumeError: It has curves that this command would not show.
    """
    from immunity.bench import store
    from immunity.errors import ResumeError

    path = folder / store.RESULT
    if not path.exists():
        return
    kept = {(c["defence"], c["attack"], c["seed"]) for c in store.read(path).get("curves", [{}]) if "seed" in c}
    lost = kept - {(job.defence, job.name, job.attack.seed) for job in todo}
    if lost or not kept:
        what = (
            ", ".join(f"{d} under {a}, seed {s}" for d, a, s in sorted(lost)) or "something that immunity did not write"
        )
        raise ResumeError(f"{path} holds {what}, which would be lost: choose another --out, or name that again, too")


def _show(records: list[dict[str, Any]], task: Task, seconds: float) -> None:
    from immunity.attacks.attack import THREATS
    from immunity.bench import store
    from immunity.bench.hardened import origin
    from immunity.metrics.trap import verdict_rows
    from immunity.pretrained import EMBEDDED
    from immunity.report import page

    first = records[0]["curve"]["defence"]
    made_from = origin(first)
    result = store.result(
        title=f"{first} under attack",
        command=store.command(),
        seconds=seconds,
        model={
            "name": made_from,
            "parameters": records[0]["parameters"],
            "licence": "Apache-2.0" if made_from in EMBEDDED else "see its card",
        },
        hardened=[one.record for one in task.known if one.record is not None],
        attacked=records,
    )
    path = task.folder / store.RESULT
    result = store.same_run(path, result)
    result["verdicts"] = verdict_rows(store.plain(result))
    store.write(path, result)
    written = page.write(store.read(path), task.folder / "report.html")
    out.print(THREATS[records[0]["attack"]["threat"]].says)
    show("data", data_table(records[0]["data"]))
    for curve in (record["curve"] for record in records):
        show(f"{curve['defence']} under {curve['attack']}, seed {curve['seed']}", curve_table(curve))
    for verdict in result["verdicts"]:
        out.print(f"{verdict['defence']} / {verdict['attack']}: {verdict['text']}", markup=False)
    out.print(f"open {written} in a browser; the numbers are in {path}", markup=False, soft_wrap=True)
