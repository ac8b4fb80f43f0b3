"""`mwtool compare`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import dry_run as dry_runs
from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single
from mwtool.models.load_options import LoadOptions
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.scan.comparison.compare import Comparison
    from mwtool.scan.scanner import Scan

DEFAULTS, LOADING = Settings(), LoadOptions()
EXAMPLES = """\
mwtool compare base.json tuned.json      # documents of mwtool scan -o
mwtool compare ./model model-q4.gguf
mwtool compare ./model ./adapter --json  # the adapter merged
"""
HELP = "A saved scan (mwtool scan -o FILE.json), or a model to scan: Hub id, folder, PEFT adapter folder (merged), GGUF file, or demo."  # noqa: E501 # one sentence of help


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="What to lay beside it: likewise.")],
    k: Annotated[
        int, typer.Option("--k", "-k", min=1, metavar="N", help="Rows to rank in a model that is scanned.")
    ] = DEFAULTS.k,
    bos: options.FirstToken = DEFAULTS.bos,
    every: Annotated[bool, typer.Option("--all", help="Name all rows of all events.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the massive dimensions of both by layer (.png, .svg or .pdf)."),
    ] = None,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
    trust_remote_code: options.Trust = False,
    dry_run: dry_runs.DryScans = False,
    trial: dry_runs.Trial = False,
    json: options.Json = False,
    output: options.Output = None,
    report: options.Page = None,
    table: options.TableFile = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Lay two scans side by side: which events and rows are kept, moved, lost or new."""
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import command_line, note_all
    from mwtool.files.document import text_of
    from mwtool.scan.comparison.compare import compare_documents
    from mwtool.scan.comparison.document import compare_document

    dry_runs.refuse_alone(trial=trial, dry_run=dry_run)
    outputs, settings = Outputs(output, plot, report, table), Settings(k=k, bos=bos)
    if dry_run:
        dry_runs.refuse_beside(plot=plot, report=report, table=table, output=output)
        models = [(named, None) for named in (a, b) if not named.endswith(".json")]
        loading = LoadOptions(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        dry_runs.show_scans(_some(models), settings, loading, trial=trial, json=json)
        return
    outputs.check()
    one, other = (_opened(named, settings, dtype, device, trust_remote_code) for named in (a, b))
    found = compare_documents(one, other, names=(a, b))
    note_all(found.notes)
    document = text_of(compare_document(found, command_line()))
    outputs.keep(document)
    if json:
        sys.stdout.write(document)
    else:
        _show(found, every=every)
    outputs.draw(document)


def _some(models: list[tuple[str, None]]) -> list[tuple[str, None]]:
    """Models to scan. Raises WrongUsage where there is none."""
    if not models:
        raise options.WrongUsage("--dry-run tells what scans take, and both are saved scans; leave it out")
    return models


def _show(found: Comparison, *, every: bool) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.scan.comparison.report import compare_report

    console = report_console()
    console.print(compare_report(found, console.width, every=every))


def _opened(named: str, settings: Settings, dtype: str, device: str, trust: bool) -> ScanDocument:
    """A saved scan, or a scan made now."""
    from mwtool.cli.terminal import note_all
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.files.schema import read_document
    from mwtool.massive import SCHEMA
    from mwtool.scan.document import scan_document

    if named.endswith(".json"):
        return read_document(Path(named), {SCHEMA: ScanDocument}, "mwtool scan -o")[1]
    scan = _scan(named, settings, dtype, device, trust)
    note_all(scan.notes)
    return ScanDocument.model_validate(scan_document(scan))


def _scan(named: str, settings: Settings, dtype: str, device: str, trust: bool) -> Scan:
    """A layer at a time; a PEFT adapter is merged into its base model, which is then in memory."""
    from mwtool.cli.terminal import layer_progress, say_once
    from mwtool.models.load import load
    from mwtool.models.locate import locate
    from mwtool.scan.loaded import scan_loaded
    from mwtool.scan.scanner import scan_checkpoint

    source = locate(named, trust_remote_code=trust)
    if source.adapter is not None:
        say_once()
        loaded = load(named, on="merged", dtype=dtype, device=device, trust_remote_code=trust)
        return scan_loaded(loaded, settings)
    source = replace(source, download="auto")
    with layer_progress() as bar:
        return scan_checkpoint(
            source, settings, dtype=dtype, device=device, on_layer=bar.on_layer, on_bytes=bar.on_bytes
        )


app = single()
app.command("compare", cls=Command, epilog=EXAMPLES)(compare)
