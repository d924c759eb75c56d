"""immunity audit: four conditions, one scorecard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from immunity.cli.console import bars, out
from immunity.cli.judging import MEASURING, FirstJudge, JudgeKey, JudgeModel, JudgeUrl, SecondJudge, ShowReal
from immunity.cli.options import (
    DATA,
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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from immunity.bench.audit import Audit

GATE: Final = 3
"""Exit code of --gate where a condition is not passed."""
HELP: Final = lines(
    "Judge MODEL by the four conditions of immunity, beside the model that it was made from.",
    "Resistance: does it withstand a battery of attacks? Stability: is it otherwise what it was? Generalisation: does "
    "the protection reach harm that the defence was not trained on? Trainability: can it be fine-tuned honestly? "
    "Each claim has an interval, the least effect that could have been seen, and a verdict: pass, fail or not enough "
    "evidence. What the budget can show is said before anything is run.",
    "Without data of your own it stands on harmless made-up worlds. Your own are --harmful, --test-harmful and "
    "--test-general, with a --judge; --benign and --test-benign for trainability; --general; and for generalisation at "
    "least three --held-out kinds of harm that the defence was not trained on. From 60 restricted test prompts on, two "
    "thirds of them, drawn by a fixed seed, measure every attack, and the other third the worst attacks once more.",
    f"{DATA_SAYS} A column gold holds the right answer, for accuracy; honest rows without one are scored by the words "
    "that an answer shares with theirs.",
    "The scorecard is printed, and kept in FOLDER/scorecard.txt and scorecard.md; the page is FOLDER/report.html. "
    "Killed, the same command goes on.",
    examples=(
        "immunity audit trap/model --baseline sft/model --out audit",
        "immunity audit trap/model --baseline sft/model --tier standard --out a2",
        "immunity audit trap/model --baseline sft/model --adaptive --out a5",
        "immunity audit trap/model --baseline sft/model --minutes 30 --out a3",
        "immunity audit other/model --baseline sft/model --baseline-runs runs --out a6",
        "immunity audit trap/model --baseline sft/model --gate --out a4",
        "immunity audit mine/model --baseline was/model --out a7 \\",
        "    --harmful theirs.jsonl --test-harmful held-out.jsonl \\",
        "    --general chat.csv --test-general chat-test.csv \\",
        "    --benign task.jsonl --test-benign task-test.jsonl \\",
        "    --held-out fraud=fraud.jsonl,fraud-test.jsonl --judge harmbench",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit", no_args_is_help=True, help=HELP)(audit)


def audit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="What immunise saved (its FOLDER/model), or any model.")
    ],
    baseline: Annotated[
        str, typer.Option(metavar="MODEL", help="The model before it was hardened, aligned in the same way.")
    ],
    folder: Out,
    tier: Annotated[
        Literal["smoke", "standard", "full"] | None,
        typer.Option(metavar="NAME", help="How much is done: smoke, standard or full. Default smoke."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1.0, metavar="N", help="Take the largest tier that should end in time.")
    ] = None,
    adaptive: Annotated[
        bool | None,
        typer.Option(
            "--adaptive/--no-adaptive",
            help="Also attack it by what is derived from how it was hardened; without that, a model can only "
            "be shown to break. Default: in the tier full only.",
        ),
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with code 3 unless all four conditions are passed.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the first attack; the others follow.")] = 1,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Jobs side by side; each holds a model.")] = 1,
    baseline_runs: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where runs on the baseline are kept and found: the next audit against the same baseline takes half "
            "the time.",
        ),
    ] = None,
    harmful: Harmful = None,
    benign: Benign = None,
    general: General = None,
    test_harmful: TestHarmful = None,
    test_general: TestGeneral = None,
    test_benign: TestBenign = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            metavar="NAME=TRAIN,TEST",
            rich_help_panel=DATA,
            help="A kind of harm that the defence was not trained on: rows to attack with, and others to measure on; "
            "NAME=DATA for a folder or set that has both. May be repeated.",
        ),
    ] = None,
    domain: Domain = "umbra",
    protocol: Protocol = "plain",
    skip_bad_rows: SkipBad = False,
    show_real: ShowReal = False,
    judge: FirstJudge = "auto",
    second_judge: SecondJudge = "auto",
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key: JudgeKey = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=MEASURING, help="Longest answer to data of your own; default 32."
        ),
    ] = None,
    template: Template = "auto",
    max_length: MaxLength = None,
    device: Device = "auto",
) -> None:
    """Judge MODEL: see :data:`HELP`."""
    from immunity.attacks.attack import Opening
    from immunity.bench import pool, store
    from immunity.bench.audit import Audit
    from immunity.bench.audited import begun
    from immunity.bench.hardened import origin
    from immunity.bench.tiers import affordable
    from immunity.bench.tiers import tier as sized
    from immunity.cli import data as sources
    from immunity.cli import grounds
    from immunity.report import page, scorecard

    if tier is not None and minutes is not None:
        raise typer.BadParameter(
            "--tier says how much is done, --minutes asks for as much as there is time for: say one"
        )
    named = grounds.Named(
        train={"harmful": harmful, "benign": benign, "general": general},
        test={"harmful": test_harmful, "general": test_general, "benign": test_benign},
        held_out=held_out or (),
        domain=domain,
        judge=judge,
        second=second_judge,
        judge_at=sources.endpoint(judge_url, judge_model, judge_key, (judge, second_judge)),
        tokens=tokens,
        protocol=protocol,
        skip_bad=skip_bad_rows,
        show_real=show_real,
    )
    ground = grounds.ground(named, model, baseline)
    opening = Opening(source=baseline, template=template, device=device, max_length=max_length)
    known = tier if minutes is None else begun(folder, minutes)
    if minutes is None or known is not None:
        size = sized(known or "smoke")
    else:
        size = affordable(_paced(opening, ground), minutes, adaptive=adaptive)
    task = Audit(
        model=model,
        baseline=baseline,
        tier=size.name,
        adaptive=adaptive,
        folder=folder,
        domain=domain,
        ground=ground,
        seed=seed,
        template=template,
        device=device,
        max_length=max_length,
        workers=workers,
        threads=1 if origin(model) == "tiny" else max(1, pool.cores() // workers),
        minutes=minutes,
        shelf=baseline_runs,
    )
    _announce(task)
    result = task.run(bars)
    card = scorecard.whole(result)
    text = scorecard.text(card)
    (folder / "scorecard.txt").write_text(text, encoding="utf-8")
    (folder / "scorecard.md").write_text(scorecard.markdown(card), encoding="utf-8")
    written = page.write(result, folder / "report.html")
    out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print(f"open {written} in a browser; the numbers are in {folder / store.RESULT}", markup=False, soft_wrap=True)
    raise typer.Exit(_code(result["audit"]["verdicts"]) if gate else 0)


def _announce(task: Audit) -> None:
    out.print(f"tier {task.size.name}: {task.size.says}", markup=False)
    for head, rows in (("it can show", task.data.supports(task.size)), ("it cannot show", task.cannot)):
        for row in rows:
            out.print(f"  {head}: {row}", markup=False, soft_wrap=True)


def _code(verdicts: Mapping[str, Any]) -> int:
    """0 if every condition is passed."""
    return 0 if verdicts and set(verdicts.values()) == {"pass"} else GATE


def _paced(opening: Any, ground: Any) -> Any:  # noqa: ANN401 - types that import torch
    """How fast this machine is with this model: two training steps and one measurement."""
    from immunity.attacks.finetune import FineTune
    from immunity.bench.assault import whole
    from immunity.bench.tiers import Pace

    home = ground.home
    suite = ground.suite(home.name, 24)
    looks: list[float] = []

    def look(model: Any) -> Any:  # noqa: ANN401 - see above
        start = time.perf_counter()
        seen = suite(model)
        looks.append(time.perf_counter() - start)
        return seen

    curve = FineTune(n=min(8, len(whole(home.data["harmful"]))), steps=2).run(opening, home.data, look)
    return Pace(step=curve.points[-1].seconds / 2.0, look=sum(looks) / len(looks))
