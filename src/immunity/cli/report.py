"""immunity report: make the page again from result.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from immunity.bench import store
from immunity.cli.console import out
from immunity.cli.options import lines
from immunity.errors import DataError

HELP: Final = lines(
    "Write FOLDER/report.html again from FOLDER/result.json.",
    "Nothing is computed: what a newer version shows better, it shows of old runs, too.",
    examples=("immunity report demo",),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report", no_args_is_help=True, help=HELP)(report)


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What demo or attack wrote to.")],
) -> None:
    """Write the page again: see :data:`HELP`."""
    from immunity.report import page

    path = folder / store.RESULT
    if not path.is_file():
        raise DataError(f"there is no {path}: immunity demo and immunity attack write one into their --out folder")
    result = store.read(path)
    if result.get("kind") == "benchmark":
        raise DataError(f"{path} was written by immunity benchmark, which has no page: it prints its tables again")
    out.print(f"wrote {page.write(result, folder / 'report.html')}", markup=False, soft_wrap=True)
