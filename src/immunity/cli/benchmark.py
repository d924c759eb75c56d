"""immunity benchmark: what a model can do by public benchmarks, beside the one that it was made from."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.table import Table
from rich.text import Text

from immunity.cli.console import bars, exit_code, failures, out
from immunity.cli.options import Device, Dtype, MaxLength, Template, lines
from immunity.cli.tables import plain_table, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from immunity.bench.worker import Outcome

HELP: Final = lines(
    "Ask MODEL the questions of public benchmarks, and with --baseline say whether it is as good as before.",
    "Tasks are those of lm-evaluation-harness (pip install 'immunity[eval]') or of Inspect (pip install "
    "'immunity[inspect]'), or your own from a folder: YAML for the one, Python for the other, and both may run code. "
    "Each score has a 95 % interval; both models are asked the same questions, and the paired difference is held "
    "against ±2 points. Every task is kept: the same command goes on, and takes further tasks.",
    examples=(
        "immunity benchmark trap/model --baseline sft/model --tasks arc_easy,hellaswag --limit 500 --out utility",
        "immunity benchmark trap/model --tasks mmlu --shots 5 --raw --out utility",
        "immunity benchmark trap/model --baseline sft/model --tasks ours --tasks-folder tasks --out utility",
        "immunity benchmark trap/model --tasks quiz --with inspect --tasks-folder tasks --out utility",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("benchmark", no_args_is_help=True, help=HELP)(benchmark)


def benchmark(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What immunise saved (its FOLDER/model), or any model.")
    ],
    tasks: Annotated[
        list[str], typer.Option(metavar="NAMES", help="Tasks, groups or tags, with commas; may be repeated.")
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model before it was hardened, asked the same.")
    ] = None,
    by: Annotated[
        Literal["lm-eval", "inspect"], typer.Option("--with", metavar="NAME", help="Whose tasks: lm-eval or inspect.")
    ] = "lm-eval",
    tasks_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where your own tasks are, YAML or Python.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N questions of each task.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples before each question; default: the task's own.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Ask with the text as it is, as base models are; default: in the template.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of what is drawn, such as examples.")] = 0,
    delta: Annotated[
        float,
        typer.Option(min=0.001, max=0.5, metavar="SHARE", help="Models that differ by less are as good as equal."),
    ] = 0.02,
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")] = Path("benchmark"),
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Questions at once.")] = 16,
    template: Template = "auto",
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Ask benchmarks: see :data:`HELP`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of others; read when they are imported
    from immunity.attacks.attack import Opening
    from immunity.bench import pool, store
    from immunity.bench.benchmarking import Asking, Benchmark
    from immunity.bench.hardened import origin
    from immunity.errors import ResumeError

    names = list(dict.fromkeys(name.strip() for word in tasks for name in word.split(",") if name.strip()))
    asking = Asking(
        by=by,
        tasks_folder=tasks_folder,
        limit=limit,
        seed=seed,
        shots=shots,
        chat=not raw,
        window=max_length,
        batch_size=batch_size,
    )
    path = folder / store.RESULT
    if path.exists() and store.read(path).get("kind") != Benchmark.kind:
        raise ResumeError(f"{path} is the result of another command: choose another --out")
    asking.check(names)
    models = [one for one in (model, baseline) if one is not None]
    todo = [
        Benchmark(
            name=source,
            opening=Opening(source=source, template=template, device=device, max_length=max_length, dtype=dtype),
            task=name,
            asking=asking,
            folder=folder / ("model", "baseline")[i] / name.replace("/", "_"),
        )
        for name in names
        for i, source in enumerate(models)
    ]
    threads = 1 if {origin(one) for one in models} == {"tiny"} else pool.cores()
    began = time.monotonic()
    with bars(todo, [1.0] * len(todo)) as shown:
        outcomes = pool.run(todo, workers=1, threads=threads, progress=shown)
    found = _result(outcomes, models, delta=delta) | {"seconds": round(time.monotonic() - began, 1), "with": by}
    if found["rows"]["model"]:
        store.write(path, found)
        _tell(found)
        out.print(f"the numbers are in {path}", markup=False, soft_wrap=True)
    failures(outcomes)
    raise typer.Exit(exit_code(outcomes))


def _result(outcomes: Sequence[Outcome], models: Sequence[str], *, delta: float) -> dict[str, Any]:
    """What goes into result.json: the rows of both models, and those of tasks that both were asked side by side."""
    from immunity.bench import store
    from immunity.metrics.benchmarks import compared

    rows: dict[str, dict[str, list[dict[str, Any]]]] = {"model": {}, "baseline": {}}
    for i, outcome in enumerate(outcomes):
        if outcome.record is not None:
            role = ("model", "baseline")[i % len(models)]
            rows[role][outcome.record["task"]] = outcome.record["rows"]
    both = [task for task in rows["model"] if task in rows["baseline"]]
    pairs = ([row for task in both for row in rows[role][task]] for role in ("model", "baseline"))
    return {
        "schema": store.SCHEMA,
        "kind": "benchmark",
        "command": store.command(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": store.versions(),
        "model": models[0],
        "baseline": models[1] if len(models) > 1 else None,
        "delta": delta,
        "rows": {role: [row for of_task in found.values() for row in of_task] for role, found in rows.items()},
        "compared": compared(*pairs, delta=delta) if both else [],
    }


def _tell(found: Mapping[str, Any]) -> None:
    """The tables, and a sentence for each task."""
    compared = found["compared"]
    side = {(row["task"], row["metric"]) for row in compared}
    alone = [row for row in found["rows"]["model"] if (row["task"], row["metric"]) not in side]
    if compared:
        shown = [row for row in compared if not row["group"]]
        show(f"{found['model']} beside {found['baseline']}", _compared(shown))
    if alone := [row for row in alone if not row["group"]]:
        show(str(found["model"]), _alone(alone))
    if parts := sum(bool(row["group"]) for row in found["rows"]["model"]):
        out.print(Text(f"{parts} rows of parts of groups are in the file only."))
    for row in compared:
        if row["says"] and row["first"] and not row["group"]:
            out.print(Text(row["says"]))


def _compared(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table()
    for name in ("task", "metric", "n", "model", "baseline", "difference", "as good?"):
        words = name in {"task", "metric", "as good?"}
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        gap = "–" if row["difference"] is None else _number(row["difference"], sign="+")
        ends = "" if row["low"] is None else f"\n{_ends(row, sign='+')}"
        verdict = {"pass": "yes", "fail": "no", "": "–"}.get(row["verdict"], "open")
        table.add_row(
            Text(row["task"]), Text(row["metric"]), str(row["n"]), _score(row["model"]), _score(row["baseline"]),
            f"{gap}{ends}", verdict,
        )  # fmt: skip
    return table


def _alone(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table()
    for name in ("task", "metric", "n", "score", "interval"):
        table.add_column(name, justify="right" if name in {"n", "score"} else "left", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row["task"]), Text(row["metric"]), str(row["n"]), _score(row), Text(row["interval"], style="dim")
        )
    return table


def _score(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    return _number(row["value"]) + ("" if row["low"] is None else f"\n{_ends(row)}")


def _ends(row: Mapping[str, Any], sign: str = "") -> str:
    return f"{_number(row['low'], sign)}…{_number(row['high'], sign)}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"
