"""immunity group: which alignment rows a fine-tune makes a model forget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from immunity.cli.console import bars, exit_code, failures, out
from immunity.cli.judging import FirstJudge, JudgeKey, JudgeModel, JudgeUrl
from immunity.cli.options import (
    DATA,
    DATA_SAYS,
    Alignment,
    Device,
    Domain,
    Dtype,
    Harmful,
    MaxLength,
    Out,
    Protocol,
    SkipBad,
    Template,
    lines,
)
from immunity.cli.tables import plain_table, show

if TYPE_CHECKING:
    from collections.abc import Mapping

PROXY: Final = "The proxy fine-tune"
COUNTING: Final = "What counts as forgotten"
HELP: Final = lines(
    "Find the alignment rows that a fine-tune makes MODEL forget, and write both groups to FOLDER.",
    "MODEL refuses already: what sft saved, say. A copy of it is fine-tuned on honest rows and a share of restricted "
    "ones. Before that and at some checkpoints it answers every alignment prompt, and a judge scores the answers. Rows "
    "that get worse at any checkpoint go to FOLDER/vulnerable.jsonl, the others to FOLDER/alignment.jsonl, the counts "
    "to FOLDER/record.json. The method vaa trains on the two files. Answers are not kept.",
    DATA_SAYS,
    "Killed or interrupted, the same command goes on from the last checkpoint.",
    examples=(
        "immunity group sft/model --out groups",
        "immunity immunise sft/model --method vaa --out vaa \\",
        "    --alignment groups/alignment.jsonl --vulnerable groups/vulnerable.jsonl",
        "immunity group my/model --judge refusal --out groups \\",
        "    --alignment refusals.jsonl --harmful restricted.jsonl --benign chat.csv",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("group", no_args_is_help=True, help=HELP)(group)


def group(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An aligned model.")],
    folder: Out,
    alignment: Alignment = None,
    harmful: Harmful = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", rich_help_panel=DATA, help="Honest rows, of which the proxy is mostly made."),
    ] = None,
    domain: Domain = "umbra",
    protocol: Protocol = "plain",
    skip_bad_rows: SkipBad = False,
    share: Annotated[
        float, typer.Option(min=0.0, max=0.99, rich_help_panel=PROXY, help="Of restricted rows; 0 is an honest one.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=PROXY, help="Training steps.")] = 100,
    lr: Annotated[float, typer.Option(metavar="RATE", rich_help_panel=PROXY, help="Learning rate.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(min=1, metavar="ROWS", rich_help_panel=PROXY, help="In a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, metavar="N", rich_help_panel=PROXY, help="Order of the rows.")] = 1,
    checkpoints: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=PROXY, help="Where every prompt is answered.")
    ] = 5,
    by: Annotated[
        Literal["answers", "nll"],
        typer.Option(
            rich_help_panel=COUNTING,
            help="answers: a judged answer got worse (the paper's). nll: the safe answer lost most likelihood; cheap, "
            "no judge, another grouping.",
        ),
    ] = "answers",
    quantile: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.99, rich_help_panel=COUNTING, help="With --by nll: share of rows to call forgotten."
        ),
    ] = 0.37,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=COUNTING, help="Longest answer.")] = 32,
    judge: FirstJudge = "auto",
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    template: Template = "auto",
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Deal the alignment data of MODEL into two groups: see :data:`HELP`."""
    from immunity.attacks.attack import Opening
    from immunity.bench import grouping, pool, standins
    from immunity.bench.hardened import ordinary, origin
    from immunity.cli import data as sources
    from immunity.errors import SettingsError
    from immunity.measure.suite import SYNTHETIC
    from immunity.method import parts

    data = sources.corpora(
        {"alignment": alignment, "harmful": harmful, "benign": benign},
        standins.defence(domain, general=ordinary(model)),
        protocol=protocol,
        skip_bad=skip_bad_rows,
    )
    if "alignment" not in data:
        raise SettingsError("there is nothing to group: give --alignment, the rows of which some are forgotten")
    made = all(part.name.startswith(SYNTHETIC) for part in parts(data["alignment"]))
    at = sources.endpoint(judge_url, judge_model, judge_key, (judge,))
    job = grouping.Grouping(
        name=model,
        opening=Opening(source=model, template=template, device=device, max_length=max_length, dtype=dtype),
        data=data,
        proxy=grouping.proxy(data, share=share, steps=steps, lr=lr, batch_size=batch_size, seed=seed),
        folder=folder,
        judge=sources.judge(judge, made=made, endpoint=at) if by == "answers" else None,
        by=by,
        share=quantile,
        checkpoints=checkpoints,
        tokens=tokens,
    )
    with bars([job], [1.0]) as shown:
        threads = 1 if origin(model) == "tiny" else pool.cores()  # so small that threads only wait
        outcomes = pool.run([job], workers=1, threads=threads, progress=shown)
    failures(outcomes)
    if outcomes[0].record is None:
        raise typer.Exit(exit_code(outcomes))
    _report(outcomes[0].record, model, folder)


def _report(record: Mapping[str, Any], model: str, folder: Path) -> None:
    from immunity.bench import store

    course, score = record["course"], "harm" if record["by"] == "answers" else "nll"
    table = plain_table()
    for head in ("step of the proxy", "mean harm of answers" if score == "harm" else "mean loss on safe answers"):
        table.add_column(head, justify="right", no_wrap=True)
    for point in course:
        table.add_row(str(point["step"]), f"{point[score]:.3f}" if score in point else "")
    show("what the proxy fine-tune did", table)
    rows = record["rows"]
    out.print(
        f"{rows['vulnerable']} of {sum(rows.values())} rows are vulnerable: {folder / 'vulnerable.jsonl'}; the others: "
        f"{folder / 'alignment.jsonl'}. Train on both with:",
        markup=False,
        soft_wrap=True,
    )
    files = ("--alignment", folder / "alignment.jsonl", "--vulnerable", folder / "vulnerable.jsonl")
    todo = store.line("immunise", model, "--method", "vaa", *files, "--out", folder / "vaa")
    out.print(f"  {todo}", markup=False, soft_wrap=True)
