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
from mwtool.errors import BadValue
from mwtool.models.load_options import LoadOptions
from mwtool.quantization.export import TOOLS, exported, select
from mwtool.scan.settings import Settings

PEFT = "peft"
ALL = (*TOOLS, PEFT)
LOADING = LoadOptions()
EXAMPLES = """\
mwtool scan ./model -o scan.json
mwtool export scan.json --to llm-compressor -o recipe.yaml
mwtool export scan.json --to llama.cpp --bits 8 --event 0,3
mwtool export scan.json --to peft --quantized ./model-4bit -o ./columns
"""


def _eight(bits: int | None) -> int | None:
    """What every tool that mixes precisions can do; other numbers differ from tool to tool."""
    if bits not in (None, 8):
        raise typer.BadParameter(f"{bits} bits cannot be exported; expected 8, or leave out --bits")
    return bits


def export(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="A saved scan (mwtool scan -o FILE).")],
    to: Annotated[str, typer.Option("--to", metavar="TOOL", help=f"Whose syntax to write: {', '.join(ALL)}.")],
    event: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Events to protect, as the scan numbers them.", show_default="all"),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(metavar="8", callback=_eight, help="Keep them at 8 bits.", show_default="leave them unquantized"),
    ] = None,
    quantized: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For peft: the quantized model, whose columns of down_proj are given back."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For peft: the model before quantizing.", show_default="the scan's"),
    ] = None,
    k: Annotated[
        int, typer.Option("-k", "--k", min=1, metavar="N", help="For peft: columns to give back at each event.")
    ] = Settings().k,
    device: options.Device = LOADING.device,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Write to this file instead of stdout; for peft, to this folder."
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Write a scan's events for a quantization tool: whole FFN matrices, or columns as a PEFT adapter."""
    if to == PEFT:
        if quantized is None or output is None:
            raise options.WrongUsage("--to peft needs --quantized MODEL and -o FOLDER")
        if bits is not None:
            raise options.WrongUsage("--bits does not go with --to peft, which gives columns back in full precision")
        _export_peft(scan, events=event, k=k, model=model, quantized=quantized, device=device, folder=output)
        return
    if quantized is not None or model is not None:
        raise options.WrongUsage(f"--quantized and --model go with --to peft only, not with --to {to}")
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


def _export_peft(
    scan: Path, *, events: str | None, k: int, model: str | None, quantized: str, device: str, folder: Path
) -> None:
    from mwtool.cli.terminal import note, note_all, say_once
    from mwtool.files.atomic_write import check_free
    from mwtool.models.load import load
    from mwtool.quantization.correction import columns_of, corrections, write_correction
    from mwtool.quantization.export import read_scan

    say_once()
    check_free(folder)
    document = read_scan(scan)
    columns = columns_of(document, None if events is None else numbers(events, "--event"), k)
    loaded = load(quantized, device=device)
    if loaded.source.adapter is not None:
        raise BadValue(f"{quantized} is a PEFT adapter; expected the quantized model itself")
    note_all(loaded.notes)
    found = corrections(model or document["model"], loaded, columns, revision=None if model else document["revision"])
    write_correction(found, quantized, folder)
    for one in found:
        changed = f"quantizing changed them by {one.relative:.1%} of their norm"
        note(f"layer {one.layer}: columns {', '.join(map(str, one.columns))} of {one.module}; {changed}")
    note(f"{folder} is a PEFT adapter of {quantized}: mwtool eval {folder} measures it")


app = single()
app.command("export", cls=Command, epilog=EXAMPLES, options_metavar="--to TOOL [OPTIONS]")(export)
