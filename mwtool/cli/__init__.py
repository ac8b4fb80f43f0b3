"""The command line: one module a subcommand. Nothing here imports torch before a command runs."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from typing import Annotated

import typer

from mwtool import __version__
from mwtool.cli.commands import LazyGroup
from mwtool.cli.memory_limit import watch
from mwtool.cli.streams import give_up_stdout, prepare
from mwtool.errors import MwtoolError, line_of

app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(on: bool) -> None:
    if on:
        typer.echo(f"mwtool {__version__}")
        raise typer.Exit


EXAMPLES = """\
mwtool scan                              # the bundled model
mwtool scan HuggingFaceTB/SmolLM2-135M
mwtool finetune --help                   # the options of a command
"""


@app.callback(epilog=EXAMPLES)
def _mwtool(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    """Find, ablate and train against massive weights in large language models."""


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    prepare()
    # Tearing down torch and transformers, Python would search their 400,000 objects for cycles again and again: 0.5 s.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        _run()
    except (MwtoolError, OSError, MemoryError, ImportError, RecursionError) as fault:
        if os.environ.get("MWTOOL_DEBUG"):
            raise
        if isinstance(fault, OSError):  # stdout on a full disk, a drive that fails to read
            give_up_stdout()
        if not isinstance(fault, BrokenPipeError):  # the reader has left
            from mwtool.cli.terminal import fail

            fail(_told(fault))
        sys.exit(1)


def _told(fault: Exception) -> str:
    """What went wrong, and what to do where the message of Python or a library does not say."""
    line = line_of(fault, whole=True)
    if isinstance(fault, MemoryError) or (isinstance(fault, OSError) and fault.errno == errno.ENOMEM):
        return f"out of memory ({line}); free some, raise the limit (ulimit -v), or use a smaller model"
    if isinstance(fault, ImportError):
        return f"a library cannot be loaded ({line}); install mwtool again, or raise the memory limit (ulimit -v)"
    if isinstance(fault, RecursionError):
        return f"a file is nested too deeply ({line})"
    return str(fault)


def _run() -> None:
    try:
        app(prog_name="mwtool")  # the name that completion uses, under `python -m mwtool` too
    finally:
        watch()  # here, since Typer sets a hook of its own when it begins
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure still counts
