"""immunity: the command line. Errors that a user can act on are printed in one paragraph, never as a traceback."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from immunity import __version__
from immunity.cli.console import listen, note
from immunity.cli.options import lines
from immunity.errors import DivergedError, ImmunityError

HELP: Final = lines(
    "Harden an open-weight language model against harmful fine-tuning, attack what you hardened, and see with numbers "
    "whether it worked.",
    "`immunity demo` does all of it on a small model, in minutes. `immunity COMMAND --help` explains a command.",
    examples=(
        "immunity demo",
        "immunity list",
        "immunity immunise tiny --method sft --lr 1e-3 --steps 60 --out sft",
        "immunity immunise sft/model --set alpha=0.3 --lr 1e-3 --out trap",
        "immunity attack trap/model --baseline sft/model --out attacked",
        "immunity attack trap/model --battery smoke --out battery",
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"immunity {__version__}\n")
        raise typer.Exit


def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: what is loaded and chosen, what libraries warn of.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - acted upon by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of every command."""
    listen(verbose=verbose)


def program() -> typer.Typer:
    """The command line with its commands; their modules import torch only when one of them runs."""
    from immunity.cli import attack, audit, benchmark, demo, group, immunise, lifecycle, listing, probe, report

    app = typer.Typer(name="immunity", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback(help=HELP)(_options)
    for module in (demo, listing, group, immunise, attack, audit, benchmark, probe, lifecycle, report):
        module.register(app)
    return app


def main() -> None:
    """Entry point of the console command: exit code 2 for what the user can change, 1 for a run that failed."""
    try:
        program()()
    except ImmunityError as error:
        note("error: ", str(error), "red")
        sys.exit(1 if isinstance(error, DivergedError) else 2)
