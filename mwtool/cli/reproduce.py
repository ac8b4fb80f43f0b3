"""`mwtool reproduce`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mwtool.cli import options, process
from mwtool.cli.command import REQUIRED, Command
from mwtool.cli.commands import single
from mwtool.errors import BadValue
from mwtool.models.load_options import DType, LoadOptions
from mwtool.reproduction.config import (
    CURRICULA,
    PARTS,
    Measuring,
    Part,
    StudyConfig,
    Training,
    parts_of,
    texts_of,
)

TRAINING, MEASURING = Training(), Measuring()
EXAMPLES = """\
mwtool reproduce ./model --data alpaca.json -o study
mwtool reproduce ./model -o study --only table1 --texts wiki=wiki.test.raw
mwtool reproduce ./model --data alpaca.json -o study --seeds 5 --jobs 4
"""
_of_training = partial(typer.Option, rich_help_panel="Fine-tuning")
_of_measuring = partial(typer.Option, rich_help_panel="Measuring")


def reproduce(
    model: options.BaseModel = "demo",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the study; one that holds the same study is resumed.",
            rich_help_panel=REQUIRED,
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART,...", help=f"Parts to do: {', '.join(PARTS)}.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Seeds of each fine-tuning run.")] = 1,
    curricula: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help=f"Curricula of table5: {', '.join(CURRICULA)}.", show_default="all of them"
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(min=1, max=64, metavar="N", help="Fine-tuning runs side by side, each in its own process."),
    ] = 1,
    texts: Annotated[
        list[str] | None,
        _of_measuring(
            metavar="NAME=FILE",
            help="Texts to measure perplexity on; repeatable. NAME=FILE, or what follows ppl: in mwtool eval.",
            show_default=",".join(MEASURING.texts),
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        _of_measuring(
            metavar="TASK",
            help="Zero-shot tasks, as in mwtool eval; repeatable, or --tasks a,b. none: no tasks.",
            show_default=",".join(MEASURING.tasks),
        ),
    ] = None,
    windows: Annotated[
        int | None, _of_measuring(min=1, metavar="N", help="Use only the first N windows of each text.")
    ] = MEASURING.windows,
    window: options.Window = MEASURING.window,
    limit: Annotated[
        int | None, _of_measuring(min=1, metavar="N", help="Use only the first N questions of each task.")
    ] = MEASURING.limit,
    eval_batch_size: Annotated[
        int | None,
        _of_measuring(min=1, metavar="N", help="Windows or questions per batch.", show_default="by memory"),
    ] = MEASURING.batch_size,
    draws: Annotated[int, _of_measuring(min=1, metavar="N", help="Random controls for each attack.")] = MEASURING.draws,
    data: Annotated[
        str | None,
        _of_training(metavar="DATA", help="Training records, as in mwtool finetune.", show_default=False),
    ] = None,
    lr: Annotated[
        float,
        _of_training("--learning-rate", "--lr", min=0, callback=options.finite, metavar="X", help="Learning rate."),
    ] = TRAINING.lr,
    epochs: Annotated[
        float,
        _of_training(
            "--num-train-epochs",
            "--epochs",
            min=0.001,
            max=1_000_000,
            callback=options.finite,
            metavar="X",
            help="Passes over the data.",
        ),
    ] = TRAINING.epochs,
    max_steps: Annotated[
        int | None, _of_training(min=1, metavar="N", help="Optimizer steps; overrides epochs.")
    ] = TRAINING.max_steps,
    batch_size: Annotated[
        int, _of_training(min=1, metavar="N", help="Sequences in one forward pass.")
    ] = TRAINING.batch_size,
    effective_batch: Annotated[
        int, _of_training(min=1, metavar="N", help="Sequences per optimizer step.")
    ] = TRAINING.effective_batch,
    max_length: Annotated[
        int | None, _of_training(min=2, metavar="N", help="Tokens in a sequence.", show_default="as mwtool finetune")
    ] = TRAINING.max_length,
    rank: Annotated[
        int, _of_training("--lora-r", "--rank", min=1, metavar="N", help="Rank of the adapters.")
    ] = TRAINING.rank,
    alpha: Annotated[
        int, _of_training("--lora-alpha", "--alpha", min=1, metavar="N", help="Adapters are scaled by alpha / rank.")
    ] = TRAINING.alpha,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is left to do, with time and memory from a short trial.")
    ] = False,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: options.Precision = "auto",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to compute: auto, cpu, cuda or mps.", rich_help_panel="Run")
    ] = "auto",
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Run the paper's study of one model and write it on one page."""
    if output is None:
        raise options.WrongUsage("--output-dir DIR (or -o) is required: the folder of the study")
    study = StudyConfig(
        model=model,
        folder=output,
        only=_parts(only),
        seeds=seeds,
        curricula=_curricula(curricula),
        jobs=jobs,
        training=Training(
            data=data,
            lr=lr,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            effective_batch=effective_batch,
            max_length=max_length,
            rank=rank,
            alpha=alpha,
        ),
        measuring=Measuring(
            texts=_texts(texts),
            tasks=() if task == ["none"] else tuple(task or MEASURING.tasks),
            windows=windows,
            window=window,
            limit=limit,
            batch_size=eval_batch_size,
            draws=draws,
        ),
        loading=LoadOptions(
            revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code, gguf_file=gguf_file
        ),
    )
    _run(study, dtype, dry_run=dry_run, json=json)


def _texts(given: list[str] | None) -> dict[str, str]:
    if given is None:
        return MEASURING.texts
    try:
        return texts_of(tuple(given))
    except BadValue as fault:
        raise options.WrongUsage(str(fault)) from fault


def _parts(only: str | None) -> tuple[Part, ...]:
    try:
        return parts_of(() if only is None else tuple(part.strip() for part in only.split(",")))
    except BadValue as fault:
        raise options.WrongUsage(str(fault)) from fault


def _curricula(names: str | None) -> tuple[str, ...]:
    given = CURRICULA if names is None else tuple(name.strip() for name in names.split(","))
    unknown = next((name for name in given if name not in CURRICULA), None)
    if unknown is not None:
        raise options.WrongUsage(f"--curricula names {unknown!r}; expected some of {', '.join(CURRICULA)}")
    return given


def quiet() -> None:
    """What libraries say to programmers is left out; in worker processes too."""
    from mwtool.cli.terminal import quiet_libraries, say_once

    say_once()
    quiet_libraries()


def _run(study: StudyConfig, dtype: DType, *, dry_run: bool, json: bool) -> None:
    from dataclasses import replace

    from mwtool.cli.terminal import command_line, note, step_progress

    quiet()
    from mwtool.files.document import text_of
    from mwtool.reproduction.document import PAGE
    from mwtool.reproduction.study import Study

    place = process.training_device(study.loading.device)
    study = replace(
        study,
        loading=replace(study.loading, device=place),
        train_dtype=process.training_precision(dtype, place),
    )
    if dry_run:
        from mwtool.reproduction.trial import lines_of, plan_of

        plan = plan_of(study)
        sys.stdout.write(text_of(plan) if json else "\n".join(lines_of(plan)) + "\n")
        return
    with step_progress() as on_step:
        document = Study(config=study, command=command_line(), on_note=note, on_step=on_step, in_worker=quiet).run()
    if json:
        sys.stdout.write(text_of(document))
    note(f"the page is {study.folder / PAGE}")
    if document["failures"]:
        raise typer.Exit(1)


app = single()
app.command("reproduce", cls=Command, epilog=EXAMPLES, options_metavar="-o DIR [OPTIONS]")(reproduce)
