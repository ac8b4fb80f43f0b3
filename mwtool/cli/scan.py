"""`mwtool scan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import options
from mwtool.models.load_options import LoadOptions
from mwtool.scan.settings import Settings, Thresholds

if TYPE_CHECKING:
    from mwtool.scan.scanner import Scan

DEFAULTS = Settings()
LIMITS, LOADING = DEFAULTS.thresholds, LoadOptions()
EXAMPLES = """\
mwtool scan                              # the bundled model
mwtool scan HuggingFaceTB/SmolLM2-135M -o scan.json
mwtool scan ./model --dtype float32 --plot layers.png
"""


def scan(
    model: options.Model = "demo",
    k: Annotated[int, typer.Option("--k", "-k", min=1, metavar="N", help="How many rows to rank.")] = DEFAULTS.k,
    bos: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="First token: auto (the tokenizer's bos, else the configuration's), always (the tokenizer's only), "
            "never, or a token or its id.",
        ),
    ] = DEFAULTS.bos,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="With --bos never: feed the first token of this text.", show_default=False),
    ] = None,
    magnitude: Annotated[
        float,
        typer.Option(
            min=0,
            callback=options.finite,
            metavar="X",
            help="A dimension of the residual stream is massive above this magnitude ...",
        ),
    ] = LIMITS.magnitude,
    ratio: Annotated[
        float,
        typer.Option(
            min=0, callback=options.finite, metavar="X", help="... and above this multiple of the median magnitude."
        ),
    ] = LIMITS.ratio,
    sun_ratio: Annotated[
        float,
        typer.Option(
            min=0,
            callback=options.finite,
            metavar="X",
            help="The multiple of the median in the stricter test of Sun et al. (2024), reported beside it.",
        ),
    ] = LIMITS.sun_ratio,
    spike: Annotated[
        float,
        typer.Option(
            min=0,
            callback=options.finite,
            metavar="X",
            help="Super weights: input and output of down_proj must both exceed this.",
        ),
    ] = LIMITS.spike,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Scan all layers instead of stopping once the answer has settled.")
    ] = DEFAULTS.all_layers,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw states and shares by layer (.png, .svg or .pdf).")
    ] = None,
    revision: options.Revision = None,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
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
        raise options.WrongUsage("--prompt is used with --bos never only; add that, or leave out --prompt")
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
