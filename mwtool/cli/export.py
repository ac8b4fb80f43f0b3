"""`mwtool export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single
from mwtool.cli.options import numbers
from mwtool.quantization.export import TOOLS, exported, select

EXAMPLES = """\
mwtool scan ./model -o scan.json
mwtool export scan.json --to llm-compressor -o recipe.yaml
mwtool export scan.json --to llama.cpp --bits 8 --event 0,3
"""


def _eight(bits: int | None) -> int | None:
    """What every tool that mixes precisions can do; other numbers differ from tool to tool."""
    if bits not in (None, 8):
        raise typer.BadParameter(f"{bits} bits cannot be exported; expected 8, or leave out --bits")
    return bits


def export(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="A saved scan (mwtool scan -o FILE).")],
    to: Annotated[str, typer.Option("--to", metavar="TOOL", help=f"Whose syntax to write: {', '.join(TOOLS)}.")],
    event: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Events to protect, as the scan numbers them.", show_default="all"),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(metavar="8", callback=_eight, help="Keep them at 8 bits.", show_default="leave them unquantized"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to FILE instead of stdout.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write the FFN matrices of a scan's events in the syntax of a quantization tool."""
    from mwtool.files.atomic_write import check_writable, write
    from mwtool.quantization.export import read_scan

    if output is not None:
        check_writable(output)
    events = None if event is None else numbers(event, "--event")
    chosen = select(read_scan(scan), events, bits)
    text = exported(to, chosen)
    if output is None:
        sys.stdout.write(text)
    else:
        write(output, text)
    from mwtool.cli.terminal import note

    note(chosen.comment)


app = single()
app.command("export", cls=Command, epilog=EXAMPLES, options_metavar="--to TOOL [OPTIONS]")(export)
