"""`--dry-run` of the commands that measure: what will run, and the memory and time that takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import options
from mwtool.cli.command import OUTPUT

if TYPE_CHECKING:
    from mwtool.evaluation.forecast import Forecast

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would run, with memory and time from a short trial, and stop.",
        rich_help_panel=OUTPUT,
    ),
]


def refuse_beside(**given: object) -> None:
    """Raise WrongUsage for an option that acts on what is measured. given: name of an option -> its value."""
    for name, value in given.items():
        if value not in (None, False):
            raise options.WrongUsage(f"--dry-run measures nothing that --{name} could use; leave one of them out")


def show(found: Sequence[Forecast], *, json: bool) -> None:
    """Print forecasts, one after the other, or their document."""
    from rich.text import Text

    from mwtool.cli.terminal import command_line, report_console
    from mwtool.evaluation.forecast import document_of, lines_of
    from mwtool.files.document import text_of

    if json:
        sys.stdout.write(text_of(document_of(found, command_line())))
        return
    for at, one in enumerate(found):
        report_console().print(Text("\n".join([*([""] if at else []), *lines_of(one)])))
