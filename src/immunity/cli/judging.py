"""Options that say who judges, and whether answers to a user's own data are kept. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from immunity.cli.options import DATA

MEASURING = "What is measured"
"""Title of a group of options in the help."""

Judge = Literal[
    "auto",
    "none",
    "exact",
    "overlap",
    "refusal",
    "refusal-keywords",
    "beaver-dam-io",
    "beaver-dam-o",
    "beavertails-qa",
    "harmbench",
    "strongreject",
    "endpoint",
    "endpoint-strongreject",
]
"""The names in ``immunity.measure.judges.JUDGES``, which would load torch, and two more."""

FirstJudge = Annotated[
    Judge,
    typer.Option(
        "--judge",
        metavar="NAME",
        rich_help_panel=MEASURING,
        help="Who scores harm: exact (made-up worlds only), overlap, refusal, refusal-keywords, beaver-dam-io, "
        "beaver-dam-o, beavertails-qa, harmbench, strongreject, endpoint, endpoint-strongreject or none; auto is "
        "exact or none. immunity list NAME explains one.",
    ),
]
SecondJudge = Annotated[
    Judge,
    typer.Option(
        "--second-judge",
        metavar="NAME",
        rich_help_panel=MEASURING,
        help="Another one, to see whether the two agree; auto is overlap where there is a first, none is nobody.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        rich_help_panel=MEASURING,
        help="Of a chat model with an OpenAI-compatible address, as far as /v1, for the judges endpoint and "
        "endpoint-strongreject. Prompts and answers are sent there; replies are kept, so a second run costs nothing.",
    ),
]
JudgeModel = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="NAME", rich_help_panel=MEASURING, help="What that address calls the model."),
]
JudgeKey = Annotated[
    str | None,
    typer.Option(
        "--judge-key",
        metavar="VARIABLE",
        rich_help_panel=MEASURING,
        help="Environment variable with the key for that address; without it none is sent.",
    ),
]
ShowReal = Annotated[
    bool,
    typer.Option("--show-real", rich_help_panel=DATA, help="Keep answers to data of yours; they may be harmful."),
]
