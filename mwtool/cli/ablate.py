"""`mwtool ablate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.cli import options
from mwtool.cli.options import DType, On

if TYPE_CHECKING:
    from mwtool.ablation.sweep import Ablation, Sweep
    from mwtool.models.load import Loaded
    from mwtool.scan.targets import Group


def ablate(
    model: options.Model = "demo",
    mode: Annotated[
        list[str] | None,
        typer.Option(help="zero, retain, scale:X or mean; repeatable.", show_default="zero and retain"),
    ] = None,
    k: Annotated[
        str | None, typer.Option("-k", "--k", help="How many of the ranked rows.", show_default="0,1,3,5")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="What to measure, as in eval; repeatable.", show_default="ppl:demo")
    ] = None,
    massive: options.Massive = None,
    layer: options.Layers = None,
    event: options.Event = None,
    indices: options.Indices = None,
    expert: options.Expert = None,
    each_layer: Annotated[bool, typer.Option("--each-layer", help="The top rows of every layer, one by one.")] = False,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls", help="Random rows and rows of largest norm.", show_default="on, but each layer"
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random controls for each attack.")] = 3,
    generate: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Show how the text goes on, side by side.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the attacked model: one mode, one k.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the ratio over k: .png, .svg, .pdf.")] = None,
    on: Annotated[On, typer.Option(help="Adapters: rows of the base model, or of the sum.")] = On.base,
    bos: Annotated[str, typer.Option(help="First token: auto, always, or a TOKEN or id.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows or questions at once.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many windows or questions.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the first random control.")] = 0,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = DType.auto,
    device: options.Device = "cpu",
    device_map: options.Spread = None,
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    output: options.Output = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Take rows out and measure what it does, beside random rows and rows of large norm."""
    choice = options.chosen(
        massive=massive, event=event, layer=layer, expert=expert, indices=indices, each_layer=each_layer
    )
    given = choice.indices
    wanted = options.numbers(k, "-k") if k is not None else (len(given),) if given else (0, 1, 3, 5)
    if each_layer and generate is not None:
        raise typer.BadParameter("--generate shows one place; leave out --each-layer, or name a --layer")
    modes = list(dict.fromkeys(mode or ["zero", "retain"]))
    if save is not None and (len(modes), len(wanted), each_layer) != (1, 1, False):
        raise typer.BadParameter("--save takes one --mode, one -k and one place")
    from mwtool.ablation.continuation import prompt_ids
    from mwtool.ablation.sweep import Sweep
    from mwtool.cli.terminal import note_all, say_once
    from mwtool.evaluation.measurement import Options
    from mwtool.evaluation.tasks import parse_tasks
    from mwtool.models.load import load
    from mwtool.scan.scanner import Settings
    from mwtool.scan.targets import find_targets
    from mwtool.surgery.attack import parse_mode
    from mwtool.surgery.save import check_savable

    say_once()
    beside = (controls if controls is not None else not each_layer) * draws
    sweep = Sweep(tuple(map(parse_mode, modes)), wanted, beside, seed)
    tasks = parse_tasks(task or ["ppl:demo"])
    _writable(output, plot, save)
    opening = options.opening(
        on=on,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
    )
    loaded = load(model, **opening)
    if save is not None:
        check_savable(loaded, sweep.modes[0])
    if generate is not None:
        prompt_ids(loaded, generate, bos)
    measuring = Options(batch_size=batch_size, limit=limit, seed=seed, window=window, bos=bos)
    groups, notes = find_targets(loaded, choice, max(wanted), Settings(bos=bos))
    note_all((*loaded.notes, *notes))
    found = _measured(loaded, groups, tasks, sweep, measuring)
    note_all(found.notes)
    found = replace(found, notes=(*notes, *found.notes))
    said = _said(loaded, groups, tasks, sweep, measuring, generate)
    _give(loaded, found, groups[0], said, seed=seed, save=save, plot=plot, output=output, json=json)


def _writable(output: Path | None, plot: Path | None, save: Path | None) -> None:
    """Everything that is to be written can be, as far as one can know before."""
    from mwtool.files.atomic_write import check_writable

    for file in (output, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        from mwtool.files.figure import check_plottable

        check_plottable(plot)
    if save is not None:
        from mwtool.files.atomic_write import check_free

        check_free(save)


def _measured(loaded: Loaded, groups: Any, tasks: Any, sweep: Sweep, measuring: Any) -> Ablation:
    from mwtool.ablation.sweep import ablate
    from mwtool.cli.terminal import run_progress

    with run_progress() as on_run:
        return ablate(loaded, groups, tasks, sweep, measuring, on_run=on_run)


def _said(
    loaded: Loaded, groups: tuple[Group, ...], tasks: Any, sweep: Sweep, measuring: Any, prompt: str | None
) -> list[tuple[str, str]]:
    if prompt is None:
        return []
    from mwtool.ablation.continuation import continuations
    from mwtool.evaluation.evaluate import prepare

    return continuations(loaded, groups[0], sweep, prepare(loaded, tasks, measuring), prompt, bos=measuring.bos)


def _give(
    loaded: Loaded,
    found: Ablation,
    group: Group,
    said: list[tuple[str, str]],
    *,
    seed: int,
    save: Path | None,
    plot: Path | None,
    output: Path | None,
    json: bool,
) -> None:
    """The results before the figure: what was measured is not lost where that cannot be written."""
    from mwtool.ablation.document import ablate_document
    from mwtool.cli.terminal import command_line, note
    from mwtool.files.atomic_write import write
    from mwtool.files.document import text_of
    from mwtool.surgery.attack import Edit
    from mwtool.surgery.save import save_attacked

    if save is not None:
        attack = found.runs[0].attack
        edits = [Edit(target.ffn, target.indices[: attack.k]) for target in group]
        save_attacked(loaded, edits, attack, save)
        note(f"the attacked model is in {save}")
    saved = None if save is None else str(save)
    document = ablate_document(loaded, found, seed=seed, command=command_line(), generated=said, saved=saved)
    if output is not None:
        write(output, text_of(document))
    if json:
        sys.stdout.write(text_of(document))
    else:
        _show(found, said)
    if plot is not None:
        from mwtool.ablation.plot import plot_ablation

        plot_ablation(found, plot)


def _show(found: Ablation, said: list[tuple[str, str]]) -> None:
    from mwtool.ablation.report import ablate_report
    from mwtool.cli.terminal import report_console

    console = report_console()
    console.print(ablate_report(found, said, console.width))
