"""`mwtool scan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import options
from mwtool.scan.settings import Settings, Thresholds

if TYPE_CHECKING:
    from mwtool.scan.scanner import Scan

DEFAULTS = Settings()
LIMITS = DEFAULTS.thresholds


def scan(
    model: options.Model = "demo",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Rows to rank.")] = DEFAULTS.k,
    bos: Annotated[
        str,
        typer.Option(
            help="First token: auto (tokenizer, else config), always (tokenizer only), never, or a TOKEN or id."
        ),
    ] = DEFAULTS.bos,
    prompt: Annotated[
        str | None, typer.Option(help="With --bos never: the text whose first token is fed.", show_default=False)
    ] = None,
    magnitude: Annotated[
        float,
        typer.Option(min=0, callback=options.finite, help="Massive: an entry of the residual stream above this ..."),
    ] = LIMITS.magnitude,
    ratio: Annotated[
        float, typer.Option(min=0, callback=options.finite, help="... and above this many times the median.")
    ] = LIMITS.ratio,
    sun_ratio: Annotated[
        float, typer.Option(min=0, callback=options.finite, help="The same for the strict published test.")
    ] = LIMITS.sun_ratio,
    spike: Annotated[
        float,
        typer.Option(min=0, callback=options.finite, help="Super weights: down_proj input and output above this."),
    ] = LIMITS.spike,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Walk to the end after the answer has settled.")
    ] = DEFAULTS.all_layers,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw states and shares by layer: .png, .svg, .pdf.")
    ] = None,
    revision: options.Revision = None,
    dtype: options.Precision = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    output: options.Output = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Find the massive weights of a model, one decoder layer in memory at a time."""
    from mwtool.cli.terminal import command_line, note_all
    from mwtool.files.atomic_write import check_writable, write
    from mwtool.files.document import text_of
    from mwtool.models.bos import PROMPT
    from mwtool.scan.document import scan_document

    if prompt is not None and bos != "never":
        raise typer.BadParameter("--prompt goes with --bos never")
    for file in (output, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        from mwtool.files.figure import check_plottable

        check_plottable(plot)
    limits = Thresholds(magnitude=magnitude, ratio=ratio, sun_ratio=sun_ratio, spike=spike)
    settings = Settings(k=k, bos=bos, prompt=prompt or PROMPT, thresholds=limits, all_layers=all_layers)
    found = _scan(model, settings, revision, dtype, device, trust_remote_code)
    note_all(found.notes)
    text = text_of(scan_document(found, command_line()))
    if output is not None:
        write(output, text)
    if plot is not None:
        from mwtool.scan.plot import plot_scan

        plot_scan(found, plot)
    if json:
        typer.echo(text, nl=False)
    else:
        _show(found)


def _scan(
    model: str,
    settings: Settings,
    revision: str | None,
    dtype: str,
    device: str,
    trust: bool,
) -> Scan:
    from mwtool.cli.terminal import layer_progress
    from mwtool.scan.scanner import scan_checkpoint

    with layer_progress() as on_layer:
        return scan_checkpoint(
            model,
            settings,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust,
            on_layer=on_layer,
        )


def _show(found: Scan) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.scan.report import scan_report

    console = report_console()
    console.print(scan_report(found, console.width))
