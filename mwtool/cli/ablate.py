"""`mwtool ablate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.ablation.config import AblateConfig
from mwtool.cli import dry_run as forecasts
from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single
from mwtool.models.load_options import LoadOptions, On

if TYPE_CHECKING:
    from mwtool.ablation.sweep import Ablation, Sweep
    from mwtool.cli.outputs import Outputs
    from mwtool.models.load import Loaded
    from mwtool.scan.targets import Group

DEFAULTS, LOADING = AblateConfig(), LoadOptions()
EXAMPLES = """\
mwtool ablate                            # the bundled model
mwtool ablate ./model --mode zero -k 1,5 --tasks ppl:wikitext2,arc_easy
mwtool ablate ./model --mode zero -k 5 --no-controls --save attacked
"""


def ablate(
    model: options.Model = "demo",
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODE",
            help="What to do with the rows: zero, retain, scale:X or mean; repeatable.",
            show_default=" and ".join(DEFAULTS.modes),
        ),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            "-k",
            "--k",
            metavar="N,N,...",
            help="How many of the ranked rows; one run for each number.",
            show_default=",".join(map(str, DEFAULTS.ks)),
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="What to measure, as in mwtool eval; repeatable, or --tasks a,b.",
            show_default=",".join(DEFAULTS.tasks),
        ),
    ] = None,
    massive: options.Massive = None,
    layer: options.Layers = None,
    event: options.Event = None,
    indices: options.Indices = None,
    expert: options.Expert = None,
    each_layer: Annotated[bool, typer.Option("--each-layer", help="Attack each layer's top rows in turn.")] = False,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Also attack random rows and the rows of largest norm, for comparison.",
            show_default="on; off with --each-layer",
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, metavar="N", help="Random controls for each attack.")] = DEFAULTS.draws,
    generate: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Show how the original and the attacked model continue this prompt."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the attacked model (one mode, one k) as a checkpoint.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue: measure only what the file given with -o does not hold yet.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the ratio over k (.png, .svg or .pdf).")
    ] = None,
    on: Annotated[
        On, typer.Option(help="With a PEFT adapter: attack the base model below it, or both merged.")
    ] = LOADING.on,
    bos: options.FirstToken = DEFAULTS.bos,
    batch_size: options.BatchSize = None,
    compile_layers: options.Compile = False,
    limit: options.Limit = None,
    window: options.Window = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the first random control.", callback=options.a_seed)
    ] = DEFAULTS.seed,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = LOADING.dtype,
    device: options.Device = LOADING.device,
    device_map: options.Spread = None,
    trust_remote_code: options.Trust = False,
    dry_run: forecasts.DryRun = False,
    json: options.Json = False,
    output: options.Output = None,
    report: options.Page = None,
    table: options.TableFile = None,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Zero, scale or replace massive rows and measure the effect, next to control rows."""
    choice = options.chosen(
        massive=massive, event=event, layer=layer, expert=expert, indices=indices, each_layer=each_layer
    )
    given = choice.indices
    wanted = options.numbers(k, "-k") if k is not None else (len(given),) if given else DEFAULTS.ks
    modes = list(dict.fromkeys(mode or DEFAULTS.modes))
    _one_layer(generate, each_layer=each_layer)
    _one_attack(save, (len(modes), len(wanted)), each_layer=each_layer)
    options.resumable(output, resume=resume)
    from mwtool.ablation.continuation import prompt_ids
    from mwtool.ablation.resume import read_earlier
    from mwtool.ablation.sweep import Sweep
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import note_all, say_once
    from mwtool.evaluation.config import Options
    from mwtool.evaluation.tasks import parse_tasks
    from mwtool.models.load import load
    from mwtool.scan.settings import Settings
    from mwtool.scan.targets import find_targets
    from mwtool.surgery.attack import parse_mode
    from mwtool.surgery.save import check_savable

    say_once()
    beside = (controls if controls is not None else not each_layer) * draws
    sweep = Sweep(tuple(map(parse_mode, modes)), wanted, beside, seed)
    tasks = parse_tasks(task or DEFAULTS.tasks)
    outputs = Outputs(output, plot, report, table)
    _check(outputs, save, dry_run=dry_run, resume=resume, generate=generate, compiled=compile_layers)
    earlier = read_earlier(output) if resume and output is not None and output.exists() else None
    loaded = load(
        model,
        on=on,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
    )
    if save is not None:
        check_savable(loaded, sweep.modes[0])
    if generate is not None:
        prompt_ids(loaded, generate, bos)
    measuring = Options(batch_size=batch_size, limit=limit, seed=seed, window=window, bos=bos, compile=compile_layers)
    groups, notes = find_targets(loaded, choice, max(wanted), Settings(bos=bos))
    note_all((*loaded.notes, *notes))
    if dry_run:
        _foretell(loaded, groups, tasks, sweep, measuring, json=json)
        return
    keeping = _Keeping(loaded, notes, output, earlier)
    found = _measured(groups, tasks, sweep, measuring, keeping)
    note_all(found.notes)
    said = _said(loaded, groups, tasks, sweep, measuring, generate)
    _give(loaded, keeping.noted(found), groups[0], said, seed=seed, save=save, outputs=outputs, json=json)


def _one_layer(generate: str | None, *, each_layer: bool) -> None:
    if each_layer and generate is not None:
        raise options.WrongUsage("--generate shows one layer; leave out --each-layer, or name a --layer")


def _one_attack(save: Path | None, counts: tuple[int, int], *, each_layer: bool) -> None:
    """Raise WrongUsage where what is to be saved is not one attack. counts: of modes, and of numbers of rows."""
    if save is not None and (*counts, each_layer) != (1, 1, False):
        raise options.WrongUsage("--save writes one attack; give one --mode and one -k, without --each-layer")


def _foretell(
    loaded: Loaded, groups: tuple[Group, ...], tasks: Any, sweep: Sweep, measuring: Any, *, json: bool
) -> None:
    from mwtool.ablation.forecast import forecast_sweep

    forecasts.show([forecast_sweep(loaded, groups, tasks, sweep, measuring)], json=json)


def _check(
    outputs: Outputs, save: Path | None, *, dry_run: bool, resume: bool, generate: str | None, compiled: bool
) -> None:
    """Raise OutputError if something to be written could not be, before the work begins; a dry run writes nothing."""
    if dry_run:
        drawn = {"plot": outputs.plot, "report": outputs.report, "table": outputs.table}
        forecasts.refuse_beside(**drawn, resume=resume, save=save, generate=generate, compile=compiled)
        return
    outputs.check()
    if save is not None:
        from mwtool.files.atomic_write import check_free

        check_free(save)


@dataclass(frozen=True, slots=True)
class _Keeping:
    """Where a sweep is kept while it runs. notes: on the rows. earlier: the document it resumes from."""

    loaded: Loaded
    notes: tuple[str, ...]
    output: Path | None
    earlier: dict[str, Any] | None

    def noted(self, found: Ablation) -> Ablation:
        """The sweep with all notes but those on the model."""
        return replace(found, notes=(*self.notes, *found.notes))

    def save(self, found: Ablation) -> None:
        """Bring the file given with -o up to date."""
        from mwtool.ablation.document import ablate_document
        from mwtool.cli.terminal import command_line
        from mwtool.evaluation.document import text_of_results
        from mwtool.files.atomic_write import write

        assert self.output is not None
        seed = 0 if found.head is None else found.head.keys["seed"]
        document = ablate_document(self.loaded, self.noted(found), seed=seed, command=command_line())
        write(self.output, text_of_results({**document, "complete": False}))


def _measured(groups: Any, tasks: Any, sweep: Sweep, measuring: Any, keeping: _Keeping) -> Ablation:
    from mwtool.ablation.head import head_of
    from mwtool.ablation.resume import earlier_measurements
    from mwtool.ablation.sweep import ablate
    from mwtool.cli.terminal import run_progress

    def resumed(plans: Any, ready: Any) -> Any:
        assert keeping.output is not None
        assert keeping.earlier is not None
        now = head_of(keeping.loaded, seed=sweep.seed, options=measuring).keys
        return earlier_measurements(keeping.output, keeping.earlier, now, plans, ready)

    with run_progress() as on_run:
        return ablate(
            keeping.loaded,
            groups,
            tasks,
            sweep,
            measuring,
            on_run=on_run,
            resumed=None if keeping.earlier is None else resumed,
            on_saved=None if keeping.output is None else keeping.save,
        )


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
    outputs: Outputs,
    json: bool,
) -> None:
    """The results before the figure: what was measured is not lost where that cannot be written."""
    from mwtool.ablation.document import ablate_document
    from mwtool.cli.terminal import command_line, note
    from mwtool.evaluation.document import text_of_results
    from mwtool.surgery.attack import Edit
    from mwtool.surgery.save import save_attacked

    if save is not None:
        attack = found.runs[0].attack
        edits = [Edit(target.ffn, target.indices[: attack.k]) for target in group]
        save_attacked(loaded, edits, attack, save)
        note(f"the attacked model is saved in {save}")
    saved = None if save is None else str(save)
    document = ablate_document(loaded, found, seed=seed, command=command_line(), generated=said, saved=saved)
    text = text_of_results(document)
    outputs.keep(text)
    if json:
        sys.stdout.write(text)
    else:
        _show(found, said)
    outputs.draw(text)


def _show(found: Ablation, said: list[tuple[str, str]]) -> None:
    from mwtool.ablation.report import ablate_report
    from mwtool.cli.terminal import report_console

    console = report_console()
    console.print(ablate_report(found, said, console.width))


app = single()
app.command("ablate", cls=Command, epilog=EXAMPLES)(ablate)
