"""`mwtool eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.cli import dry_run as forecasts
from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single
from mwtool.errors import BadValue
from mwtool.evaluation.config import EvalConfig, Options
from mwtool.evaluation.tasks import expected
from mwtool.evaluation.windows import PROTOCOLS, protocol_named
from mwtool.models.load_options import LoadOptions, On

if TYPE_CHECKING:
    from mwtool.evaluation.run import Evaluations

CONFIG = EvalConfig()
MEASURING = CONFIG.measuring
EXAMPLES = """\
mwtool eval ./model --tasks ppl:wikitext2,arc_easy -o eval.json
mwtool eval ./model --task ppl:text.txt --attack none --attack zero:5
mwtool eval --compare eval.json ./finetuned --task ppl:wikitext2
"""


def _known_protocol(name: str | None) -> str | None:
    """Refuse an unknown protocol as a usage error."""
    if name is not None:
        try:
            protocol_named(name)
        except BadValue as fault:
            raise typer.BadParameter(str(fault)) from fault
    return name


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face Hub id, local folder, PEFT adapter folder, or demo for the bundled model; with "
            "--compare several of them, or earlier result files.",
            show_default="demo",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help=f"{expected()}; repeatable, or --tasks a,b.",
            show_default=",".join(CONFIG.tasks),
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ATTACK",
            help="none, zero:K, retain:K or scale:FACTOR:K, with @2+11 for rows of these layers; repeatable.",
            show_default=",".join(CONFIG.attacks),
        ),
    ] = None,
    massive: options.Massive = None,
    event: options.Event = None,
    layer: options.Layers = None,
    indices: options.Indices = None,
    expert: options.Expert = None,
    on: Annotated[
        On, typer.Option(help="With a PEFT adapter: attack the base model below it, or both merged.")
    ] = CONFIG.loading.on,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show several models or result files next to the first.")
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="PROTOCOL",
            callback=_known_protocol,
            help=f"How a text is cut into windows: {', '.join(PROTOCOLS)}.",
            show_default="sun-4096 for datasets, bos for files",
        ),
    ] = MEASURING.protocol,
    window: options.Window = MEASURING.window,
    bos: Annotated[
        str, typer.Option(metavar="TOKEN", help="First token: auto, always, never, or a token or its id.")
    ] = MEASURING.bos,
    delimiter: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Text between context and continuation in mc: and cloze: files.",
            show_default="a space",
        ),
    ] = MEASURING.delimiter,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="At most this many tokens for each answer of generate: and judge:.")
    ] = MEASURING.new_tokens,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|URL",
            help="Who grades the answers of judge: from 1 to 5: a model, or http://HOST:PORT/v1#MODEL.",
        ),
    ] = MEASURING.judge,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Windows, questions or prompts per batch.", show_default="by memory"),
    ] = MEASURING.batch_size,
    compile_layers: options.Compile = MEASURING.compile,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only the first N examples of each task.")
    ] = MEASURING.limit,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the results with their intervals (.png, .svg or .pdf)."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Seed of few-shot examples and of sampling, where a task uses them."),
    ] = MEASURING.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue: skip what the file given with -o already holds.")
    ] = False,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = CONFIG.loading.dtype,
    device: options.Device = CONFIG.loading.device,
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
    """Measure perplexity and zero-shot tasks of a model, attacked or not."""
    models = list(dict.fromkeys(model or ["demo"]))
    _usage(models, compare=compare, resume=resume, output=output, of_one=(revision, gguf_file, massive))
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import command_line, note, run_progress, say_once
    from mwtool.evaluation.run import evaluate_models

    say_once()
    outputs = Outputs(output, plot, report, table)
    if dry_run:
        forecasts.refuse_beside(plot=plot, report=report, table=table, resume=resume, compile=compile_layers)
    else:
        outputs.check()
    wanted = EvalConfig(
        tasks=tuple(task or CONFIG.tasks),
        attacks=tuple(attack or CONFIG.attacks),
        choice=options.chosen(massive=massive, event=event, layer=layer, expert=expert, indices=indices),
        measuring=Options(
            batch_size=batch_size,
            limit=limit,
            seed=seed,
            protocol=protocol,
            window=window,
            bos=bos,
            delimiter=delimiter,
            new_tokens=new_tokens,
            judge=judge,
            compile=compile_layers,
        ),
        loading=LoadOptions(
            on=on,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            gguf_file=gguf_file,
        ),
    )
    if dry_run:
        from mwtool.evaluation.forecast_models import forecast_models

        forecasts.show(forecast_models(models, wanted, compare=compare, on_note=note), json=json)
        return
    with run_progress() as on_task:
        found = evaluate_models(
            models,
            wanted,
            output=output,
            compare=compare,
            resume=resume,
            command=command_line(),
            on_note=note,
            on_task=on_task,
        )
    outputs.draw(_shown(found, found.compared(command_line()) if compare else found.documents[0], json=json))


def _shown(found: Evaluations, document: dict[str, Any], *, json: bool) -> str:
    """The text of the document, which is printed, or the table of it."""
    from mwtool.cli.terminal import report_console
    from mwtool.evaluation.document import text_of_results
    from mwtool.evaluation.report import eval_report

    text = text_of_results(document)
    if json:
        sys.stdout.write(text)
    else:
        report_console().print(eval_report(found.entries))
    return text


def _usage(
    models: Sequence[str],
    *,
    compare: bool,
    resume: bool,
    output: Path | None,
    of_one: tuple[str | Path | None, ...],
) -> None:
    if len(models) > 1 and not compare:
        raise options.WrongUsage(
            f"{len(models)} models are given; expected one, or --compare to show them side by side"
        )
    if len(models) > 1 and any(value is not None for value in of_one):
        raise options.WrongUsage(
            "--revision, --gguf-file and --massive belong to one MODEL; evaluate each with -o FILE, then compare"
        )
    options.resumable(output, resume=resume)


app = single()
app.command("eval", cls=Command, epilog=EXAMPLES)(evaluate)
