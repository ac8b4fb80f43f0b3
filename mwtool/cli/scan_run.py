"""What `mwtool scan` does once its options are understood: plan, scan, check, show, draw, upload."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mwtool.cli import dry_run as dry_runs
from mwtool.models.load_options import Download, LoadOptions
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from mwtool.ablation.check import Check
    from mwtool.models.hub_upload import Destination
    from mwtool.scan.scanner import Scan


@dataclass(frozen=True, slots=True)
class Measured:
    """What a check is measured on: a text, how many windows of it, and how many tokens each."""

    text: str
    limit: int
    window: int


def show_plan(model: str, settings: Settings, opening: LoadOptions, *, trial: bool, json: bool) -> None:
    """Show what would be read."""
    from mwtool.cli.terminal import command_line, report_console
    from mwtool.files.document import text_of
    from mwtool.scan.forecast import document_of, forecast_scan
    from mwtool.scan.tables import plan_table

    before = dry_runs.since_start()
    found = forecast_scan(
        model,
        settings,
        revision=opening.revision,
        dtype=opening.dtype,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
        gguf_file=opening.gguf_file,
        trial=trial,
    )
    if json:
        typer.echo(text_of(document_of(found, command_line(), before=before)), nl=False)
    else:
        report_console().print(plan_table(found, before))


def run_scan(model: str, settings: Settings, opening: LoadOptions, download: Download) -> Scan:
    """Scan a checkpoint, with a bar of layers and bytes."""
    from mwtool.cli.terminal import layer_progress, say_once
    from mwtool.scan.scanner import scan_checkpoint

    say_once()
    with layer_progress() as bar:
        return scan_checkpoint(
            model,
            settings,
            revision=opening.revision,
            dtype=opening.dtype,
            device=opening.device,
            trust_remote_code=opening.trust_remote_code,
            gguf_file=opening.gguf_file,
            download=download,
            on=opening.on,
            on_layer=bar.on_layer,
            on_bytes=bar.on_bytes,
        )


def run_check(model: str, found: Scan, opening: LoadOptions, on: Measured) -> Check:
    """Load the scanned model whole and measure on it; on a device that emulates bfloat16, in float32 by default."""
    from mwtool.ablation.check import check_scan
    from mwtool.cli.process import training_precision
    from mwtool.cli.terminal import note_all, run_progress, say_once
    from mwtool.models.load import load

    say_once()
    stored = training_precision(opening.dtype, opening.device)
    if opening.dtype != "auto" or (stored != "bfloat16" and found.dtype == "bfloat16"):
        opening = replace(opening, dtype=stored)
    if opening.on == "base":  # of an adapter's folder the base model was scanned
        model, opening = found.identity.model, replace(opening, revision=found.identity.revision)
    if opening.revision is None:  # a local file or folder, which the name of what was scanned says
        opening = replace(opening, gguf_file=None)
    loaded = load(model, **asdict(opening))
    with run_progress() as on_run:
        progress = on_run(0, 1, "check")
        checked = check_scan(loaded, found, on.text, limit=on.limit, window=on.window, on_progress=progress)
    note_all(checked.notes)
    return checked


def show(found: Scan, checked: Check | None, *, states: bool, super_weights: bool, protect: bool, every: bool) -> None:
    """The report, or in its place the tables asked for."""
    from mwtool.cli.terminal import report_console
    from mwtool.scan.report import Checked, scan_report
    from mwtool.scan.states_tables import positions_table, sinks_table, triggers_table
    from mwtool.scan.tables import protect_table, states_table, super_weights_table

    console = report_console()
    texts = (found.positions, found.sinks, found.triggers)
    if not (states or super_weights or protect) and (checked is not None or texts == (None, None, None)):
        made = None
        if checked is not None:
            from mwtool.ablation.check import cells_of, lines_of

            made = Checked(checked.k, cells_of(checked), lines_of(checked))
        console.print(scan_report(found, console.width, every=every or made is not None, check=made))
    if states:
        console.print(states_table(found, console.width, every=every))
    if super_weights:
        console.print(super_weights_table(found))
    if protect:
        console.print(protect_table(found))
    if found.positions is not None:
        console.print(positions_table(found.positions))
    if found.sinks is not None:
        console.print(sinks_table(found.sinks, None if found.massive is None else found.massive.layer))
    if found.triggers is not None:
        console.print(triggers_table(found.triggers))


def write_triggers(found: Scan, triggers: Path) -> None:
    """Write massive dimensions and tokens to a file."""
    from mwtool.cli.terminal import command_line
    from mwtool.files.atomic_write import write
    from mwtool.files.document import text_of
    from mwtool.scan.states_document import trigger_document

    write(triggers, text_of(trigger_document(found, command_line())))


def draw_beside(document: str, plot: Path) -> None:
    """Figures of whole texts and of a router, beside that over the layers."""
    from mwtool.cli.terminal import note
    from mwtool.files.figure import save_figure
    from mwtool.scan.states_plot import figures_of

    for name, figure in figures_of(loads(document)):
        beside = plot.with_stem(f"{plot.stem}-{name}")
        save_figure(figure, beside)
        note(f"the figure of {name} is in {beside}")


def push(document: str, destination: Destination) -> None:
    """Upload the document and its card."""
    from mwtool.cli.terminal import note
    from mwtool.files.document import text_of
    from mwtool.models.hub_upload import upload_files
    from mwtool.scan.card import DOCUMENT, published_scan, scan_card

    published = published_scan(loads(document))
    files = {DOCUMENT: text_of(published), "README.md": scan_card(published)}
    upload_files(destination, files, f"Scan of {published['model']} by mwtool")
    note(f"the scan is at {destination.url}")
