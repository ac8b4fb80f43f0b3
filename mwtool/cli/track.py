"""`mwtool track`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mwtool.cli import dry_run as dry_runs
from mwtool.cli import options
from mwtool.cli.command import OUTPUT, Command
from mwtool.cli.commands import single
from mwtool.models.load_options import LoadOptions
from mwtool.scan.settings import Settings, Thresholds

if TYPE_CHECKING:
    from mwtool.scan.tracking.track import Stage

DEFAULTS, LOADING = Settings(), LoadOptions()
EXAMPLES = """\
mwtool track --checkpoints ./run -o track.json --plot track.png
mwtool track EleutherAI/pythia-70m --revisions step512,step1000,step4000
mwtool track ./early ./middle ./late
"""


def track(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] ...", help="Models in the order of training; one with --revisions."),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Every checkpoint-N of a training run's folder, by step."),
    ] = None,
    revisions: Annotated[
        str | None,
        typer.Option(metavar="REV,...", help="Branches, tags or commits of MODEL on the Hub."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, metavar="N", help="How many rows to rank.")] = DEFAULTS.k,
    bos: options.FirstToken = DEFAULTS.bos,
    magnitude: Annotated[
        float,
        typer.Option(
            min=0, callback=options.finite, metavar="X", help="A dimension is massive above this magnitude ..."
        ),
    ] = DEFAULTS.thresholds.magnitude,
    ratio: Annotated[
        float,
        typer.Option(
            min=0, callback=options.finite, metavar="X", help="... and above this multiple of the median magnitude."
        ),
    ] = DEFAULTS.thresholds.ratio,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves (.png, .svg or .pdf).")] = None,
    report: options.Page = None,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
    trust_remote_code: options.Trust = False,
    dry_run: dry_runs.DryScans = False,
    trial: dry_runs.Trial = False,
    json: options.Json = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the JSON document to FILE after each checkpoint; what FILE holds already is not scanned again.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Follow how massive weights emerge over the checkpoints of a training run."""
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import command_line, layer_progress, note_all, say_once
    from mwtool.files.document import text_of
    from mwtool.scan.tracking.document import earlier_in, track_document
    from mwtool.scan.tracking.report import HEADING, track_line
    from mwtool.scan.tracking.track import Checkpoint, Track
    from mwtool.scan.tracking.track import track as follow

    name, stages = _stages(models or [], checkpoints, revisions)
    dry_runs.refuse_alone(trial=trial, dry_run=dry_run)
    outputs = Outputs(output, plot, report)
    settings = Settings(k=k, bos=bos, thresholds=Thresholds(magnitude=magnitude, ratio=ratio))
    if dry_run:
        dry_runs.refuse_beside(plot=plot, report=report, output=output)
        loading = LoadOptions(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        every = [(one.model, one.revision) for one in stages]
        dry_runs.show_scans(every, settings, loading, trial=trial, json=json)
        return
    outputs.check()
    say_once()
    earlier = None if output is None else earlier_in(output, name, settings, dtype)
    command = command_line()
    headed: list[str] = []

    def done(so_far: Track, one: Checkpoint) -> None:
        outputs.keep(text_of(track_document(so_far, command)))
        if not json:
            lines = [track_line(one)] if headed else [HEADING, track_line(one)]
            headed.extend(lines)
            typer.echo("\n".join(lines))

    with layer_progress() as bar:
        found = follow(
            name,
            stages,
            settings,
            earlier=earlier,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            on_layer=bar.on_layer,
            on_bytes=bar.on_bytes,
            on_checkpoint=done,
        )
    note_all(found.notes)
    document = text_of(track_document(found, command))
    if json:
        sys.stdout.write(document)
    outputs.draw(document)


def _stages(models: list[str], checkpoints: Path | None, revisions: str | None) -> tuple[str, tuple[Stage, ...]]:
    """What the checkpoints are called together, and each of them. Raises WrongUsage."""
    from mwtool.scan.tracking.track import stages_in, stages_of

    if checkpoints is not None and (models or revisions):
        raise options.WrongUsage("--checkpoints names a folder of checkpoints; leave out MODEL and --revisions")
    if checkpoints is not None:
        return str(checkpoints), stages_in(checkpoints)
    if not models:
        raise options.WrongUsage(
            "nothing to track; give the folder of a training run, MODEL with --revisions, or several MODELs"
        )
    named = () if revisions is None else tuple(one.strip() for one in revisions.split(",") if one.strip())
    if revisions is not None and len(models) != 1:
        raise options.WrongUsage(f"--revisions are those of one MODEL; {len(models)} are given")
    return models[0], stages_of(models, named)


app = single()
app.command("track", cls=Command, epilog=EXAMPLES)(track)
