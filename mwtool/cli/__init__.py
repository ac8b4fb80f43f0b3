"""The command line: one module a subcommand. Nothing here imports torch before a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mwtool import __version__
from mwtool.cli.ablate import ablate
from mwtool.cli.adapters import adapters
from mwtool.cli.eval import evaluate
from mwtool.cli.finetune import finetune
from mwtool.cli.scan import ScanCommand, scan
from mwtool.errors import MwtoolError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=ScanCommand)(scan)
app.command()(ablate)
app.command("eval")(evaluate)
app.command()(finetune)
app.add_typer(adapters, name="adapters")


def _version(on: bool) -> None:
    if on:
        typer.echo(f"mwtool {__version__}")
        raise typer.Exit


@app.callback()
def _mwtool(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    """Find, ablate and train against massive weights in large language models."""


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        _run()
    except (MwtoolError, OSError) as fault:  # OSError: stdout on a full disk, a drive that fails to read
        if os.environ.get("MWTOOL_DEBUG"):
            raise
        from mwtool.cli.terminal import fail, give_up_stdout

        if isinstance(fault, OSError):
            give_up_stdout()
        if not isinstance(fault, BrokenPipeError):  # whoever read has seen enough
            fail(str(fault))
        sys.exit(1)


def _run() -> None:
    try:
        app(prog_name="mwtool")  # as it is completed, under `python -m mwtool` too
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure still counts
