"""What several commands can be told: the types and the words of their options. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

DATA = "Data"
"""Title of a group of options in the help."""
MODEL = "How the model is opened"
"""Title of a group of options in the help."""


def lines(*paragraphs: str, examples: Sequence[str] = ()) -> str:
    """Help of a command: prose that flows, and examples that keep their lines."""
    shown = ["\n".join(["Examples:", *(f"  {line}" for line in examples)])] if examples else []
    return "\n\n".join([*paragraphs, *shown]).replace("[", r"\[")


Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything of this run goes.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the preset; may be repeated."),
]

Alignment = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Refusals and ordinary conversations to keep."),
]
Harmful = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Restricted prompts with compliant answers."),
]
General = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Ordinary conversations that the trap shall collapse."),
]
Benign = Annotated[
    list[str] | None, typer.Option(metavar="DATA", rich_help_panel=DATA, help="The task of an honest user.")
]
Safe = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="A safe answer to each prompt of --harmful."),
]
Heldout = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        rich_help_panel=DATA,
        help="Restricted rows to judge simulated attackers by; a fifth of --harmful if a method needs it.",
    ),
]
Vulnerable = Annotated[
    list[str] | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Alignment rows that a fine-tune forgets first (vaa)."),
]
TestHarmful = Annotated[
    str | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Held-out restricted prompts to measure harm on."),
]
TestGeneral = Annotated[
    str | None,
    typer.Option(metavar="DATA", rich_help_panel=DATA, help="Held-out conversations to measure collapse on."),
]
TestBenign = Annotated[
    str | None, typer.Option(metavar="DATA", rich_help_panel=DATA, help="Held-out rows of the honest user's task.")
]
Domain = Annotated[
    Literal["umbra", "noctis", "cipher", "gate"],
    typer.Option(
        metavar="NAME", rich_help_panel=DATA, help="Made-up world where no data is named: umbra, noctis, cipher, gate."
    ),
]
Protocol = Annotated[
    Literal["plain", "vaccine", "booster", "ctrap"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=DATA,
        help="Whose rows and prompts of a public set: plain, vaccine, booster or ctrap.",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad-rows", rich_help_panel=DATA, help="Leave bad rows of files out, and count them."),
]

Template = Annotated[
    Literal["auto", "chat", "chatml", "alpaca", "alpaca-vaccine", "plain"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="How a prompt is written: chat (the tokenizer's own), chatml, alpaca, alpaca-vaccine, plain (no more "
        "than a newline); auto is what the model was saved with.",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="TOKENS", rich_help_panel=MODEL, help="Of prompt and answer together; default 256."),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=MODEL, help="auto, cpu, cuda, cuda:1 … (auto: CUDA if any).")
]
Dtype = Annotated[
    Literal["float32", "bfloat16"], typer.Option(rich_help_panel=MODEL, help="Of weights that are not trained.")
]

DATA_SAYS = (
    "DATA is a file (.jsonl, .json, .csv, .parquet) with the columns prompt and response, or instruction, input and "
    "output, or messages; a public set; a public set whose files are at hand, written set@FOLDER; or synthetic:NAME. "
    "`immunity list` names the sets. If no data is named at all, harmless made-up worlds stand in."
)
