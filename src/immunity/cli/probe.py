"""immunity probe: how the losses lie around a model, where a trap fires and where it does not. A diagnostic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.text import Text

from immunity.cli.console import bars, exit_code, failures, out
from immunity.cli.judging import MEASURING
from immunity.cli.options import (
    DATA_SAYS,
    Benign,
    Device,
    Domain,
    General,
    Harmful,
    MaxLength,
    Out,
    Protocol,
    SkipBad,
    Template,
    TestBenign,
    TestGeneral,
    TestHarmful,
    lines,
)
from immunity.cli.tables import plain_table, show

if TYPE_CHECKING:
    from immunity.bench.worker import Outcome

WHERE: Final = "Where it looks"
HELP: Final = lines(
    "Look at the losses around MODEL: where a trap fires, how deep and wide it is, and what stays clear of it.",
    "The weights are moved along the harmful gradient (one normalised step, and Adam's first), along the benign one, "
    "in random directions, and on short paths of either kind. On the way the losses on held-out rows are measured; the "
    "collapse loss falls where a trap fires. Cosines, norms and curvatures of the gradients are measured, too.",
    "It is a diagnostic and no verdict: nobody attacks, nothing is generated, nothing is judged. Figures are in "
    "FOLDER/report.html, the numbers in FOLDER/result.json. Seconds on the tiny model; on SmolLM2 and a processor "
    "tens of minutes, fewer with --draws 1 --path-steps 0. A model that is done is kept.",
    DATA_SAYS,
    examples=(
        "immunity probe trap/model --baseline sft/model --out shape",
        "immunity probe trap/model --draws 5 --path-steps 16 --out s2",
        "immunity probe trap/model --distance 0.3 --both-signs --out s3",
        "immunity probe mine/model --harmful theirs.jsonl --benign task.jsonl \\",
        "    --test-harmful held-out.jsonl --test-general chat.csv --out s4",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("probe", no_args_is_help=True, help=HELP)(probe)


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What immunise saved (its FOLDER/model), or any model.")
    ],
    folder: Out,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model before it was hardened, shown beside.")
    ] = None,
    harmful: Harmful = None,
    benign: Benign = None,
    general: General = None,
    test_harmful: TestHarmful = None,
    test_general: TestGeneral = None,
    test_benign: TestBenign = None,
    domain: Domain = "umbra",
    protocol: Protocol = "plain",
    skip_bad_rows: SkipBad = False,
    distance: Annotated[
        list[float] | None,
        typer.Option(
            min=1e-9,
            metavar="LENGTH",
            rich_help_panel=WHERE,
            help="From the model's weights, over all of them together; may be repeated. Default: 9 from 0.01 to 2.",
        ),
    ] = None,
    both_signs: Annotated[
        bool, typer.Option("--both-signs", rich_help_panel=WHERE, help="Also go the other way, uphill.")
    ] = False,
    path_steps: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=WHERE, help="Of a path; 0 leaves paths out.")
    ] = 8,
    path_step: Annotated[
        float, typer.Option(min=1e-9, metavar="LENGTH", rich_help_panel=WHERE, help="Of each step of a path.")
    ] = 0.1,
    path_rule: Annotated[
        Literal["normalised", "adam"],
        typer.Option(metavar="NAME", rich_help_panel=WHERE, help="Steps of a path: normalised, or adam (Adam-like)."),
    ] = "normalised",
    draws: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=MEASURING, help="Batches, and random directions.")
    ] = 3,
    rows: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=MEASURING, help="Of a batch.")] = 16,
    prompts: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=MEASURING, help="Held-out rows of each kind.")
    ] = 12,
    word: Annotated[
        str | None,
        typer.Option(metavar="WORD", rich_help_panel=MEASURING, help="Of collapse; default: the trap's own, or error."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=MEASURING, help="Of batches and random directions.")
    ] = 0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, metavar="ROWS", rich_help_panel=MEASURING, help="Rows per gradient pass.")
    ] = None,
    template: Template = "auto",
    max_length: MaxLength = None,
    device: Device = "auto",
) -> None:
    """Look around MODEL: see :data:`HELP`."""
    from immunity.attacks.attack import Opening
    from immunity.bench import pool, standins, store
    from immunity.bench.geometry import around
    from immunity.bench.hardened import hardened, ordinary, origin
    from immunity.cli import data as sources
    from immunity.errors import ResumeError
    from immunity.measure.geometry import DISTANCES, Probe
    from immunity.report import page

    path = folder / store.RESULT
    if path.exists() and store.read(path).get("kind") != KIND:
        raise ResumeError(f"{path} is the result of another command: choose another --out")
    how = Probe(
        distances=tuple(sorted(set(distance))) if distance else DISTANCES,
        both_signs=both_signs,
        draws=draws,
        rows=rows,
        measured=prompts,
        path_steps=path_steps,
        path_step=path_step,
        path_rule=path_rule,
        seed=seed,
        micro_batch=micro_batch,
    )
    everyday, named = ordinary(model), {"harmful": harmful, "benign": benign, "general": general}
    tests = {"harmful": test_harmful, "general": test_general, "benign": test_benign}
    _both_or_neither(named, tests)
    data = sources.attackers(
        named, standins.attacker(domain, general=everyday), protocol=protocol, skip_bad=skip_bad_rows
    )
    suite = sources.suite(
        tests,
        standins.suite(domain, n=prompts, word=word or hardened(model).word or "error", general=everyday),
        judge_name="none",
        prompts=prompts,
        protocol=protocol,
        skip_bad=skip_bad_rows,
    )
    sources.warn_of_overlap(data, suite)
    opening = Opening(source=model, template=template, device=device, max_length=max_length)
    models = list(dict.fromkeys([model, *([] if baseline is None else [baseline])]))
    jobs = around(models, opening, data, suite, probe=how, folder=folder)
    threads = 1 if {origin(one) for one in models} == {"tiny"} else pool.cores()
    with bars(jobs, [1.0] * len(jobs)) as shown:
        outcomes = pool.run(jobs, workers=1, threads=threads, progress=shown)
    if outcomes[0].record is not None:
        found = _result(outcomes)
        before = store.read(path) if path.exists() else {}
        store.write(path, before if before.get("geometry") == found["geometry"] else found)
        _tell(found["geometry"])
        written = page.write(store.read(path), folder / "report.html")
        out.print(f"open {written} in a browser; the numbers are in {path}", markup=False, soft_wrap=True)
    failures(outcomes)
    raise typer.Exit(exit_code(outcomes))


KIND: Final = "geometry"


def _both_or_neither(named: Mapping[str, Sequence[str] | None], tests: Mapping[str, str | None]) -> None:
    """Refuse rows to take gradients over without rows to measure on, or the other way round.

    Raises:
        SettingsError: Only one of the two is given.
    """
    from immunity.errors import SettingsError

    if any(named.values()) and not any(tests.values()):
        raise SettingsError("measuring on data of your own needs --test-harmful and --test-general, too")
    if any(tests.values()) and not named["harmful"]:
        raise SettingsError("data of your own to measure on need --harmful, too: rows to take gradients over")


def _result(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What goes into result.json."""
    from immunity.bench import store
    from immunity.bench.geometry import told

    records = {
        role: one.record for role, one in zip(("model", "baseline"), outcomes, strict=False) if one.record is not None
    }
    first = records["model"]
    rows = {(row["role"], row["fingerprint"]): row for record in records.values() for row in record["data"]}
    return {
        "schema": store.SCHEMA,
        "kind": KIND,
        "title": f"Geometry around {first['name']}",
        "command": store.command(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(record["seconds"] for record in records.values()), 1),
        "versions": store.versions(),
        "model": {"name": first["name"], "parameters": first["parameters"]},
        "data": list(rows.values()),
        "geometry": told(records),
    }


def _tell(found: Mapping[str, Any]) -> None:
    """The numbers of every model, and what they say."""
    from immunity.report.geometry_words import DIAGNOSTIC, findings, interval, length, name_of, number, width

    for model in found["models"]:
        summary = model["summary"]
        table = plain_table()
        for head in (
            "direction",
            "basin",
            "depth",
            "onset",
            "width",
            f"at {length(summary['at'])}: collapse",
            "general",
        ):
            table.add_column(head, justify="left" if head == "direction" else "right", overflow="fold")
        for row in summary["directions"]:
            table.add_row(
                Text(name_of(row["direction"]).title),
                f"{row['fired']}/{row['n']}",
                interval(row["depth"]).split(" [")[0],
                interval(row["onset"], length).split(" [")[0],
                width(row).split(" [")[0],
                number(row["there"].get("collapse")),
                number(row["there"].get("general")),
            )
        show(str(model["name"]), table)
        for line in findings(summary):
            out.print(Text(line))
    out.print(Text(DIAGNOSTIC, style="dim"))
