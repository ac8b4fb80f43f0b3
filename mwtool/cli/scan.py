"""`mwtool scan`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mwtool.ablation.config import CheckConfig
from mwtool.cli import dry_run as dry_runs
from mwtool.cli import options
from mwtool.cli.command import MODEL, Command
from mwtool.cli.commands import single
from mwtool.cli.options import numbers
from mwtool.cli.scan_run import Measured, draw_beside, push, run_check, run_scan, show, show_plan, write_triggers
from mwtool.cli.startup import rarely_collecting, without_scipy
from mwtool.models.load_options import Download, LoadOptions, On
from mwtool.scan.settings import ByHand, Settings, Texts, Thresholds


class ScanCommand(Command):
    """`--check` and `--sinks` may stand alone: the bundled text is then meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give one that ends the line, or comes before another option, its default value."""
        alone = {"--check", "--sinks"}
        args = [
            f"{arg}={CHECKING.text}" if arg in alone and (at + 1 == len(args) or args[at + 1].startswith("-")) else arg
            for at, arg in enumerate(args)
        ]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run it, with as few imports and searches for garbage as it can do with."""
        with rarely_collecting(), without_scipy():
            return super().invoke(ctx)


BY_HAND, TABLES, CHECK = "Choosing another event or other rows", "More tables", "Checking the prediction"
WHOLE = "Whole texts"
"""Panels of `--help`."""
DEFAULTS = Settings()
DOWNLOAD: Download = "auto"
LIMITS, TEXTS, LOADING, CHECKING = DEFAULTS.thresholds, DEFAULTS.texts, LoadOptions(), CheckConfig()
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
    layers: Annotated[
        str | None,
        typer.Option(metavar="0-N", help="Scan up to layer N only.", show_default="all layers"),
    ] = None,
    event: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Report the rows of this event (from 0, as listed).", rich_help_panel=BY_HAND
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Report the rows of this layer (from 0).", rich_help_panel=BY_HAND),
    ] = None,
    indices: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Report these rows, in this order (from 0).", rich_help_panel=BY_HAND),
    ] = None,
    expert: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Report the rows of this routed expert (from 0).", rich_help_panel=BY_HAND
        ),
    ] = None,
    states: Annotated[
        bool,
        typer.Option("--states", help="Show hidden and intermediate states layer by layer.", rich_help_panel=TABLES),
    ] = False,
    super_weights: Annotated[
        bool, typer.Option("--super-weights", help="Show super weights and their events.", rich_help_panel=TABLES)
    ] = False,
    protect: Annotated[
        bool,
        typer.Option(
            "--protect",
            help="Show which parameters and indices to keep in high precision when quantizing.",
            rich_help_panel=TABLES,
        ),
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Show all layers and all events.", rich_help_panel=TABLES)
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="[TEXT]",
            help="Measure what the model loses without each event's rows, on the bundled text or as in ppl:TEXT.",
            rich_help_panel=CHECK,
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Show both states of the massive layer, and the attention received, at each position of a text, with "
            "bos at its start, in its middle, at its end and without.",
            rich_help_panel=WHOLE,
        ),
    ] = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="With --positions: keep the attention maps of the massive layer and its neighbours.",
            rich_help_panel=WHOLE,
        ),
    ] = False,
    sinks: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]",
            help="Measure how many heads are attention sinks, by layer, on the bundled text or FILE.",
            rich_help_panel=WHOLE,
            show_default=False,
        ),
    ] = None,
    sink_epsilon: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="EPS",
            help="With --sinks: mean attention to the first token above which a head is a sink.",
            rich_help_panel=WHOLE,
        ),
    ] = TEXTS.eps,
    sink_length: Annotated[
        int,
        typer.Option(min=2, metavar="T", help="With --sinks: tokens in a window.", rich_help_panel=WHOLE),
    ] = TEXTS.sink_length,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Find the tokens and positions of a text whose state is massive (demo: the bundled text).",
            rich_help_panel=WHOLE,
        ),
    ] = None,
    triggers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --text: write massive dimensions and tokens to FILE.", rich_help_panel=WHOLE
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="With --check or --text: windows of the text to use.", rich_help_panel=WHOLE
        ),
    ] = CHECKING.limit,
    window: Annotated[
        int,
        typer.Option(
            min=CHECKING.shortest,
            metavar="N",
            help="With --check or --text: tokens in a window.",
            rich_help_panel=WHOLE,
        ),
    ] = CHECKING.window,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw states and events by layer (.png, .svg or .pdf); what was found in whole texts, and the router "
            "of a mixture of experts, goes to files beside it: FILE-positions, FILE-sinks ...",
        ),
    ] = None,
    on: Annotated[
        On, typer.Option(help="With a PEFT adapter: scan its base model, or both merged.", rich_help_panel=MODEL)
    ] = LOADING.on,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    download: Annotated[
        Download,
        typer.Option(
            help="Of weights on the Hub that are not in the cache: fetch the tensors read by ranges, or files whole.",
            rich_help_panel=MODEL,
        ),
    ] = DOWNLOAD,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show layers, tensors and bytes to be read, and memory, and stop.", rich_help_panel=MODEL
        ),
    ] = False,
    trial: dry_runs.Trial = False,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    output: options.Output = None,
    report: options.Page = None,
    table: options.TableFile = None,
    push_to_hub: options.PushToHub = None,
    hub_private_repo: options.HubPrivate = False,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Find the massive weights of a model, one decoder layer in memory at a time."""
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import command_line, note_all
    from mwtool.files.document import text_of
    from mwtool.models.bos import PROMPT

    unused = prompt is not None and bos != "never"
    _refuse(unused, "--prompt is used with --bos never only; add that, or leave out --prompt")
    _refuse(event is not None and layer is not None, "--event and --layer name a place each; give one of them")
    last = None if layers is None else _last(layers)
    rows = () if indices is None else numbers(indices, "--indices")
    check = _usable(check, sinks, text)
    others = (check, positions, sinks, text, triggers, output, plot, report, table, push_to_hub)
    _check_plan(others, dry_run=dry_run, trial=trial)
    outputs = Outputs(output, plot, report, table)
    outputs.check()
    _check_triggers(triggers, text)
    destination = options.hub_destination(push_to_hub, "dataset", private=hub_private_repo)
    settings = Settings(
        k=k,
        bos=bos,
        prompt=prompt or PROMPT,
        thresholds=Thresholds(magnitude=magnitude, ratio=ratio, sun_ratio=sun_ratio, spike=spike),
        last_layer=last,
        by_hand=ByHand(event=event, layer=layer, expert=expert, indices=rows),
        texts=_texts(positions, attention, (sinks, sink_epsilon, sink_length), text, limit, window),
    )
    place: dict[str, Any] = {"on": on, "revision": revision, "gguf_file": gguf_file}
    opening = LoadOptions(dtype=dtype, device=device, trust_remote_code=trust_remote_code, **place)
    if dry_run:
        show_plan(model, settings, opening, trial=trial, json=json)
        return
    download = "whole" if check is not None and download == "auto" else download  # the model is loaded afterwards
    found = run_scan(model, settings, opening, download)
    from mwtool.scan.document import scan_document  # with torch, whose import is part of the scan's time

    note_all(found.notes)
    checked = None if check is None else run_check(model, found, opening, Measured(check, limit, window))
    document = text_of(scan_document(found, command_line(), None if checked is None else checked.document()))
    outputs.keep(document)
    if triggers is not None:
        write_triggers(found, triggers)
    if json:
        typer.echo(document, nl=False)
    else:
        show(found, checked, states=states, super_weights=super_weights, protect=protect, every=every)
    outputs.draw(document)
    if plot is not None:
        draw_beside(document, plot)
    if destination is not None:
        push(document, destination)


PLAN_ALONE = "--dry-run shows what a scan of bos reads and makes no results; leave out texts, --check and files"


def _check_plan(others: tuple[Any, ...], *, dry_run: bool, trial: bool) -> None:
    """Raise WrongUsage for a plan beside results, and for a trial without one. others: None where not given."""
    _refuse(dry_run and any(one is not None for one in others), PLAN_ALONE)
    dry_runs.refuse_alone(trial=trial, dry_run=dry_run)


def _check_triggers(triggers: Path | None, text: str | None) -> None:
    """Raise WrongUsage for triggers without a text, OutputError where they cannot be written."""
    from mwtool.files.atomic_write import check_writable

    if triggers is not None:
        _refuse(text is None, "--triggers writes what --text finds; add --text FILE")
        check_writable(triggers)


def _refuse(wrong: bool, message: str) -> None:
    """Raise WrongUsage where options contradict each other."""
    if wrong:
        raise options.WrongUsage(message)


def _usable(check: str | None, sinks: str | None, text: str | None) -> str | None:
    """The text of --check, with or without the `ppl:` of other commands; opened, so that a wrong name costs no scan.

    Raises WrongUsage for a folder, which is a model that stands behind an option.
    """
    for name, given in (("--check", check), ("--sinks", sinks), ("--text", text)):
        if given is not None:
            _refuse(Path(given).is_dir(), f"{name} takes a text, and {given} is a folder; write MODEL before {name}")
    if check is None:
        return None
    from mwtool.evaluation.tasks import KINDS, Task

    target = check.removeprefix("ppl:")
    KINDS["ppl"].check(Task("ppl", target))
    return target


def _texts(
    positions: str | None,
    attention: bool,
    sinks: tuple[str | None, float, int],
    text: str | None,
    limit: int,
    window: int,
) -> Texts:
    """What to run besides bos; files are opened now, so that a wrong name costs no scan. Raises WrongUsage."""
    from mwtool.scan.given import bundled_or_file, text_or_file

    if attention and positions is None:
        raise options.WrongUsage("--attention keeps the attention maps of a text; give one with --positions")
    if positions is not None:
        text_or_file(positions)
    of_sinks, eps, length = sinks
    alone = of_sinks is None and (eps, length) != (TEXTS.eps, TEXTS.sink_length)
    _refuse(alone, "--sink-epsilon and --sink-length are of --sinks; add that")
    for file in (of_sinks, text):
        if file is not None:
            bundled_or_file(file)
    return Texts(
        positions=positions,
        attention=attention,
        sinks=of_sinks,
        eps=eps,
        sink_length=length,
        triggers=text,
        windows=limit,
        length=window,
    )


def _last(layers: str) -> int:
    """The end of a range such as 0-15; raises WrongUsage."""
    found = re.fullmatch(r"\s*0\s*-\s*(\d{1,9})\s*", layers, flags=re.ASCII)
    if found is None:
        raise options.WrongUsage(
            f"--layers {layers!r} is not a range that begins at layer 0; expected one such as 0-15"
        )
    return int(found[1])


app = single()
app.command("scan", cls=ScanCommand, epilog=EXAMPLES)(scan)
