"""`mwtool scan`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mwtool.cli import options
from mwtool.cli.options import DType, numbers

if TYPE_CHECKING:
    from mwtool.ablation.check import Check
    from mwtool.scan.scanner import Scan, Settings


class ScanCommand(TyperCommand):
    """`--check` may stand alone: the bundled text is then meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a `--check` that ends the line, or comes before another option, its default value."""
        for at, arg in enumerate(args):
            if arg == "--check" and (at + 1 == len(args) or args[at + 1].startswith("-")):
                args = [*args[:at], "--check=demo", *args[at + 1 :]]
                break
        return super().parse_args(ctx, args)


BY_HAND, TABLES, CHECK = "Choosing another event or other rows", "More tables", "Checking the prediction"
"""Panels of `--help`."""


def scan(
    model: options.Model = "demo",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Rows to rank.")] = 5,
    bos: Annotated[
        str,
        typer.Option(
            help="First token: auto (tokenizer, else config), always (tokenizer only), never, or a TOKEN or id."
        ),
    ] = "auto",
    prompt: Annotated[
        str | None, typer.Option(help="With --bos never: the text whose first token is fed.", show_default=False)
    ] = None,
    magnitude: Annotated[
        float,
        typer.Option(min=0, callback=options.finite, help="Massive: an entry of the residual stream above this ..."),
    ] = 100,
    ratio: Annotated[
        float, typer.Option(min=0, callback=options.finite, help="... and above this many times the median.")
    ] = 50,
    sun_ratio: Annotated[
        float, typer.Option(min=0, callback=options.finite, help="The same for the stricter published test.")
    ] = 1000,
    spike: Annotated[
        float,
        typer.Option(min=0, callback=options.finite, help="Super weights: down_proj input and output above this."),
    ] = 50,
    layers: Annotated[
        str | None,
        typer.Option(metavar="0-N", help="Walk to layer N only.", show_default="to the last layer"),
    ] = None,
    event: Annotated[
        int | None, typer.Option(min=0, help="Rows of this event, by its number.", rich_help_panel=BY_HAND)
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Rows of this layer.", rich_help_panel=BY_HAND)] = None,
    indices: Annotated[
        str | None, typer.Option(metavar="I,J,...", help="These rows, in this order.", rich_help_panel=BY_HAND)
    ] = None,
    expert: Annotated[
        int | None, typer.Option(min=0, help="Rows of this routed expert.", rich_help_panel=BY_HAND)
    ] = None,
    states: Annotated[
        bool, typer.Option("--states", help="Both states layer by layer.", rich_help_panel=TABLES)
    ] = False,
    super_weights: Annotated[
        bool, typer.Option("--super-weights", help="Super weights and their events.", rich_help_panel=TABLES)
    ] = False,
    protect: Annotated[
        bool,
        typer.Option(
            "--protect", help="Parameters and indices to keep when quantizing, by event.", rich_help_panel=TABLES
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Fold no layers and no events.", rich_help_panel=TABLES)] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="[TEXT]",
            help="Measure what each event's rows carry, on the bundled text or as in ppl:TEXT.",
            rich_help_panel=CHECK,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Windows of the text.", rich_help_panel=CHECK)] = 8,
    window: Annotated[int, typer.Option(min=32, help="Tokens of a window.", rich_help_panel=CHECK)] = 512,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw states and events by layer: .png, .svg, .pdf.")
    ] = None,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = DType.auto,
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
    from mwtool.scan.by_hand import ByHand
    from mwtool.scan.definitions import Thresholds
    from mwtool.scan.document import scan_document
    from mwtool.scan.scanner import Settings

    if prompt is not None and bos != "never":
        raise typer.BadParameter("--prompt goes with --bos never")
    if event is not None and layer is not None:
        raise typer.BadParameter("--event and --layer name a place each; give one of them")
    last = None if layers is None else _last(layers)
    rows = () if indices is None else numbers(indices, "--indices")
    for file in (output, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        from mwtool.files.figure import check_plottable

        check_plottable(plot)
    limits = Thresholds(magnitude=magnitude, ratio=ratio, sun_ratio=sun_ratio, spike=spike)
    by_hand = ByHand(event=event, layer=layer, expert=expert, indices=rows)
    settings = Settings(k=k, bos=bos, prompt=prompt or PROMPT, thresholds=limits, last_layer=last, by_hand=by_hand)
    found = _scan(model, settings, revision, dtype.value, device, trust_remote_code, gguf_file)
    note_all(found.notes)
    checked = None if check is None else _checked(found, check, limit, window, dtype, device, trust_remote_code)
    text = text_of(scan_document(found, command_line(), None if checked is None else checked.document()))
    if output is not None:
        write(output, text)
    if plot is not None:
        from mwtool.scan.plot import plot_scan

        plot_scan(found, plot)
    if json:
        typer.echo(text, nl=False)
    else:
        _show(found, checked, states=states, super_weights=super_weights, protect=protect, every=every)


def _last(layers: str) -> int:
    """The end of a range such as 0-15; raises BadParameter, which is wrong usage."""
    found = re.fullmatch(r"\s*0\s*-\s*(\d{1,9})\s*", layers, flags=re.ASCII)
    if found is None:
        raise typer.BadParameter(
            f"--layers {layers!r} is no range from layer 0, where every walk begins; expected one such as 0-15"
        )
    return int(found[1])


def _scan(
    model: str,
    settings: Settings,
    revision: str | None,
    dtype: str,
    device: str,
    trust: bool,
    gguf_file: str | None,
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
            gguf_file=gguf_file,
            on_layer=on_layer,
        )


def _checked(found: Scan, text: str, limit: int, window: int, dtype: DType, device: str, trust: bool) -> Check:
    """Load the scanned model whole and measure on it; on a device that emulates bfloat16, in float32 by default."""
    from mwtool.ablation.check import check_scan
    from mwtool.cli.process import training_precision
    from mwtool.cli.terminal import note_all, run_progress, say_once
    from mwtool.models.load import load

    say_once()
    stored = training_precision(dtype, device)
    wanted = "auto" if dtype is DType.auto and (stored == "bfloat16" or found.dtype != "bfloat16") else stored
    loaded = load(
        found.identity.model, revision=found.identity.revision, dtype=wanted, device=device, trust_remote_code=trust
    )
    with run_progress() as on_run:
        checked = check_scan(loaded, found, text, limit=limit, window=window, on_progress=on_run(0, 1, "check"))
    note_all(checked.notes)
    return checked


def _show(found: Scan, checked: Check | None, *, states: bool, super_weights: bool, protect: bool, every: bool) -> None:
    """The report, or in its place the tables asked for."""
    from mwtool.cli.terminal import report_console
    from mwtool.scan.report import Checked, scan_report
    from mwtool.scan.tables import protect_table, states_table, super_weights_table

    console = report_console()
    if not (states or super_weights or protect):
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
