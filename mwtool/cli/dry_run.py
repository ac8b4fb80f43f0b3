"""`--dry-run` of the commands that measure: what will run, and the memory and time that takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import options
from mwtool.cli.command import OUTPUT

if TYPE_CHECKING:
    from mwtool.evaluation.forecast import Forecast
    from mwtool.models.load_options import LoadOptions
    from mwtool.scan.settings import Settings

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would run, with memory and time from a short trial, and stop.",
        rich_help_panel=OUTPUT,
    ),
]
Trial = Annotated[
    bool,
    typer.Option(
        "--trial",
        help="With --dry-run: also run a little of it, which reads weights, for time and measured memory.",
        rich_help_panel=OUTPUT,
    ),
]


DryScans = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what the scans would read, and memory, and stop.", rich_help_panel=OUTPUT),
]


def show_scans(
    models: Sequence[tuple[str, str | None]], settings: Settings, loading: LoadOptions, *, trial: bool, json: bool
) -> None:
    """Print what scans of these models take, or its document. models: each with its revision, None if it has none."""
    from mwtool.cli.terminal import command_line, report_console
    from mwtool.files.document import text_of
    from mwtool.scan.forecast import document_of_series, forecast_series
    from mwtool.scan.tables import series_table

    before = since_start()
    found = forecast_series(
        models,
        settings,
        dtype=loading.dtype,
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        trial=trial,
    )
    if json:
        sys.stdout.write(text_of(document_of_series(found, command_line(), before=before)))
    else:
        report_console().print(series_table(found, before))


def refuse_alone(*, trial: bool, dry_run: bool) -> None:
    """Raise WrongUsage for a trial of what is then run."""
    if trial and not dry_run:
        raise options.WrongUsage("--trial belongs to --dry-run; add that, or leave out --trial")


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
    from mwtool.files.units import duration

    before = since_start() - sum(one.trial for one in found)
    if json:
        sys.stdout.write(text_of(document_of(found, command_line(), before=before)))
        return
    for at, one in enumerate(found):
        report_console().print(Text("\n".join([*([""] if at else []), *lines_of(one)])))
    report_console().print(Text(f"besides   {duration(before)} to start, to load and to prepare, as measured"))


def since_start() -> float:
    """Seconds since this process began."""
    import psutil  # type: ignore[import-untyped] # its stubs are a package of their own

    return float(time.time() - psutil.Process().create_time())
