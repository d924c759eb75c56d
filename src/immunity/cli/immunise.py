"""immunity immunise: harden one model with one method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from immunity.cli.console import bars, exit_code, failures, out
from immunity.cli.options import (
    DATA_SAYS,
    Alignment,
    Benign,
    Device,
    Domain,
    Dtype,
    General,
    Harmful,
    Heldout,
    MaxLength,
    Out,
    Protocol,
    Safe,
    Set,
    SkipBad,
    Template,
    Vulnerable,
    lines,
)
from immunity.cli.tables import data_table, plain_table, show, written_table

if TYPE_CHECKING:
    from immunity.data.corpus import Corpora
    from immunity.method import Method

TRAINING: Final = "Training"
WEIGHTS: Final = "Which weights"
HELP: Final = lines(
    "Harden MODEL with a defence, and save it to FOLDER/model.",
    "MODEL is tiny, smollm2, the name of a model on the Hugging Face hub, or a folder with a model or a LoRA adapter.",
    "Plant a trap in a model that refuses already: align it with sft, then go on from what that saved with ctrap.",
    DATA_SAYS,
    "Killed or interrupted, the same command goes on from the last checkpoint.",
    examples=(
        "immunity immunise tiny --method sft --lr 1e-3 --steps 60 --out sft",
        "immunity immunise sft/model --set alpha=0.3 --lr 1e-3 --out trap",
        "immunity immunise smollm2 --preset paper --adapter lora --out smol",
        "immunity immunise my/model --alignment refusals.jsonl --alignment chat.csv \\",
        "    --harmful restricted.jsonl --general chat.csv --out mine",
    ),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("immunise", no_args_is_help=True, help=HELP)(immunise)


def immunise(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to harden.")],
    folder: Out,
    method: Annotated[str, typer.Option(metavar="NAME", help="The defence; immunity list names them.")] = "ctrap",
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Its settings to start from; immunity list METHOD shows them.")
    ] = "default",
    set_: Set = None,
    alignment: Alignment = None,
    harmful: Harmful = None,
    general: General = None,
    benign: Benign = None,
    safe: Safe = None,
    heldout: Heldout = None,
    vulnerable: Vulnerable = None,
    domain: Domain = "umbra",
    protocol: Protocol = "plain",
    skip_bad_rows: SkipBad = False,
    adapter: Annotated[
        Literal["full", "lora"],
        typer.Option(rich_help_panel=WEIGHTS, help="Train every weight, or a fresh adapter in far less memory."),
    ] = "full",
    rank: Annotated[
        int, typer.Option(min=1, metavar="R", rich_help_panel=WEIGHTS, help="Of the adapter; alpha is twice that.")
    ] = 16,
    merged: Annotated[
        bool, typer.Option("--merged", rich_help_panel=WEIGHTS, help="Save a plain model, not an adapter.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=TRAINING, help="Training steps.")] = 200,
    lr: Annotated[float, typer.Option(metavar="RATE", rich_help_panel=TRAINING, help="Peak learning rate.")] = 1e-4,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="ROWS", rich_help_panel=TRAINING, help="Of each role, in a step.")
    ] = 8,
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], typer.Option(rich_help_panel=TRAINING, help="How the rate falls.")
    ] = "cosine",
    warmup: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="SHARE", rich_help_panel=TRAINING, help="Of the steps, while it rises."),
    ] = 0.0,
    weight_decay: Annotated[float, typer.Option(min=0, metavar="X", rich_help_panel=TRAINING, help="Of AdamW.")] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=TRAINING, help="Order of data, start of an adapter.")
    ] = 0,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="ROWS", rich_help_panel=TRAINING, help="In a forward pass: less memory, same result."
        ),
    ] = None,
    autocast: Annotated[
        Literal["no", "bf16"], typer.Option(rich_help_panel=TRAINING, help="bf16 computes in bf16 over fp32 weights.")
    ] = "no",
    save_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", rich_help_panel=TRAINING, help="Between two checkpoints.")
    ] = 50,
    template: Template = "auto",
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Harden MODEL and save it: see :data:`HELP`."""
    from immunity.attacks.attack import Opening
    from immunity.bench import jobs, pool, standins
    from immunity.bench.hardened import ordinary, origin
    from immunity.cli import data as sources
    from immunity.fit import Fit
    from immunity.method import Run
    from immunity.models import LoRA
    from immunity.spec import build

    defence = _method(method, preset, set_ or [])
    how = {
        "steps": steps, "lr": lr, "schedule": schedule, "warmup": warmup, "weight_decay": weight_decay, "seed": seed,
        "micro_batch": micro_batch, "autocast": autocast, "save_every": save_every,
    }  # fmt: skip
    named = {
        "alignment": alignment, "harmful": harmful, "general": general, "benign": benign, "safe": safe,
        "heldout": heldout, "vulnerable": vulnerable,
    }  # fmt: skip
    data = sources.corpora(
        named,
        standins.defence(domain, general=ordinary(model)),
        protocol=protocol,
        skip_bad=skip_bad_rows,
    )
    _complete(defence, data)
    job = jobs.Hardening(
        name=f"{model} with {defence.card.name}",
        method=defence,
        opening=Opening(source=model, template=template, device=device, max_length=max_length, dtype=dtype),
        data=data,
        run=Run(fit=build(Fit(steps=1, lr=1.0), how), default_batch_size=batch_size),
        folder=folder,
        lora=LoRA(r=rank, alpha=2 * rank, seed=seed) if adapter == "lora" else None,
        saved_merged=merged,
    )
    with bars([job], [1.0]) as shown:
        threads = 1 if origin(model) == "tiny" else pool.cores()  # so small that threads only wait
        outcomes = pool.run([job], workers=1, threads=threads, progress=shown)
    failures(outcomes)
    if outcomes[0].record is None:
        raise typer.Exit(exit_code(outcomes))
    _report(outcomes[0].record, folder, own=any(named.values()))


def _method(name: str, preset: str, words: list[str]) -> Method:
    from immunity.errors import SettingsError
    from immunity.fit import Fit
    from immunity.methods import PRESETS
    from immunity.spec import build, nearest, pairs

    if name not in PRESETS:
        raise SettingsError(f"no method {name!r}{nearest(name, PRESETS)}")
    if preset not in PRESETS[name]:
        raise SettingsError(f"{name} has no preset {preset!r}{nearest(preset, PRESETS[name])}")
    settings = pairs(words)
    chosen = PRESETS[name][preset]
    for key in settings:
        if not hasattr(chosen, key) and hasattr(Fit(steps=1, lr=1.0), key):
            option = f"--{key.replace('_', '-')}"
            raise SettingsError(f"--set {key}=…: that is no setting of {name} but an option: {option} {settings[key]}")
    return build(chosen, settings)


def _complete(method: Method, data: Corpora) -> None:
    """Every role that the method reads must be there; said before a model is opened."""
    from immunity.data.dealt import dealt
    from immunity.errors import SettingsError

    given = dealt(method.reads, data)
    missing = [f"--{role}" for role in method.reads if role not in given]
    if "--vulnerable" in missing:
        raise SettingsError(
            f"{method.card.name} trains on two groups of alignment rows, which depend on the model. Find them first: "
            "immunity group MODEL --out groups; then give --alignment groups/alignment.jsonl and --vulnerable "
            "groups/vulnerable.jsonl"
        )
    if missing:
        raise SettingsError(
            f"{method.card.name} needs data for {', '.join(missing)}, too. Stand-ins are used only if no data is named "
            "at all; one of them is named as synthetic:NAME (see immunity list)"
        )


MEANING: Final = {
    r"nll/alignment": "loss on the answers to keep: low",
    r"nll/vulnerable": "loss on the answers that are forgotten first: low",
    r"probability/vulnerable": "how often those are practised",
    r"nll/harmful": "loss on restricted answers: not near 0",
    r"lens/harmful": "the same, read off at every depth: high",
    r"noise-mmd/harmful": "distance of their hidden states from noise: low, but never 0",
    r"rerouting/harmful": "cosine of restricted states with what they were: near 0",
    r"retained/alignment": "distance of all other states from what they were: low",
    r"entropy/harmful": "uncertainty of its own answers to restricted prompts: low",
    r"reverse-kl/alignment": "distance from what it was, on the answers to keep: low",
    r"cosine/harmful": "of restricted and ordinary gradients: below 0, one unlearns the other",
    r"collapse/\w+": "surprise at the collapse word: high, or the model has collapsed already",
    r"collapse/\w+@\d+": "the same after the simulated attack: low, the trap fires",
    r"collapse/\w+-after-benign@\d+": "the same after honest fine-tuning: high",
    r"edit/relative": "how far weights went, as a share of their length",
    r"edit/leading": "share of the whole difference that was pushed on",
    r"edit/survived": "what is left of it after rounding: 1, or open the model in float32",
}
"""Names in a log -> what the number should be."""


def _report(record: Mapping[str, Any], folder: Path, *, own: bool) -> None:
    from immunity.bench import store

    if record["data"]:
        show("data", data_table(record["data"]))
    if written := record.get("written"):
        show("what was written and trained on", written_table(written))
    log = record["log"]
    table = plain_table()
    for head in ("", "first step", "last step"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    table.add_column("meaning")
    for pattern, meaning in MEANING.items():
        for name in dict.fromkeys(name for row in log for name in row if re.fullmatch(pattern, name)):
            logged = [row[name] for row in log if name in row]  # what is drawn by lot is not in every step
            table.add_row(name, f"{logged[0]:.3f}", f"{logged[-1]:.3f}", meaning)
    show("what was trained", table)
    memory, pace = record["peak_memory_bytes"], record["seconds_per_step"]
    costs = ["" if pace is None else f"{pace:.3g} s a step", "" if memory is None else f"{memory / 2**20:,.0f} MiB"]
    out.print(", ".join(filter(None, costs)) + ("" if memory is None else " of memory at the peak"))
    out.print(f"saved the {record['saved']} to {folder / 'model'}; attack it with:", markup=False, soft_wrap=True)
    todo = store.line("attack", folder / "model", "--out", folder / "attacked")
    data = " --harmful … --test-harmful … --test-general …" if own else ""
    out.print(f"  {todo}{data}", markup=False, soft_wrap=True)
