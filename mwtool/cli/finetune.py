"""`mwtool finetune`."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mwtool.cli import options, process
from mwtool.cli.options import DType

if TYPE_CHECKING:
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.plan import Asked, Plan
    from mwtool.finetune.trainer import Telling
    from mwtool.macdrop.curriculum import Curriculum
    from mwtool.models.source import Source


class Peft(StrEnum):
    """Which adapter is trained."""

    lora = "lora"
    dora = "dora"


class Format(StrEnum):
    """How the rows of DATA are read."""

    auto = "auto"
    alpaca = "alpaca"
    messages = "messages"
    text = "text"


class Scope(StrEnum):
    """Which rows entries are dropped from."""

    massive = "massive"
    others = "others"
    all = "all"


class Resample(StrEnum):
    """How often a mask is drawn."""

    step = "step"
    microbatch = "microbatch"


class Quantize(StrEnum):
    """How the frozen weights are packed."""

    four_bit = "4bit"


_of_data = partial(typer.Option, rich_help_panel="Data")
_of_adapter = partial(typer.Option, rich_help_panel="Adapter")
_of_macdrop = partial(typer.Option, rich_help_panel="MacDrop")
_of_training = partial(typer.Option, rich_help_panel="Training")
_of_run = partial(typer.Option, rich_help_panel="Run")
_of_model = partial(typer.Option, rich_help_panel=options.MODEL)


def finetune(
    model: options.BaseModel = "demo",
    data: Annotated[
        str | None,
        _of_data(
            "--data", metavar="DATA", help="JSON, JSONL, Parquet or text file, or a Hub dataset: OWNER/NAME[:CONFIG]."
        ),
    ] = None,
    macdrop: Annotated[
        str, _of_macdrop(metavar="SCHEDULE|FILE.yaml", help="When and how much is dropped; none: plain LoRA or DoRA.")
    ] = "step:0.8",
    peft: Annotated[Peft, _of_adapter(help="The adapter.")] = Peft.lora,
    output: Annotated[Path | None, _of_run("--output", "-o", metavar="DIR", help="Where the adapter goes.")] = None,
    format_: Annotated[Format, _of_data("--format", help="How rows are read; auto looks at their keys.")] = Format.auto,
    split: Annotated[str, _of_data(help="Of a Hub dataset or folder.")] = "train",
    skip_bad_rows: Annotated[
        bool, _of_data("--skip-bad-rows", help="Leave out rows that cannot be read instead of stopping.")
    ] = False,
    train_on_prompt: Annotated[
        bool, _of_data("--train-on-prompt", help="Learn prompts, too, and not answers alone.")
    ] = False,
    rank: Annotated[int, _of_adapter(min=1, help="Width of the adapter.")] = 16,
    alpha: Annotated[int, _of_adapter(min=1, help="Its scale is alpha over rank.")] = 16,
    dropout: Annotated[float, _of_adapter(min=0, max=1, help="Of the adapter's input.")] = 0.0,
    target_modules: Annotated[
        list[str] | None,
        _of_adapter(help="Layers with an adapter; repeatable.", show_default="all linear but embeddings and head"),
    ] = None,
    lr: Annotated[float, _of_training(min=0, callback=options.finite, help="Learning rate after warm-up.")] = 1e-4,
    warmup: Annotated[float, _of_training(min=0, max=1, help="Share of the steps.")] = 0.05,
    epochs: Annotated[float, _of_training(min=0.001, callback=options.finite, help="Times through the data.")] = 3.0,
    max_steps: Annotated[int | None, _of_training(min=1, help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, _of_training(min=1, help="Sequences a device takes at once.")] = 8,
    effective_batch: Annotated[
        int, _of_training(min=1, help="Sequences of an optimizer step, reached by accumulation.")
    ] = 256,
    max_length: Annotated[
        int | None, _of_data(min=2, help="Tokens of a sequence.", show_default="1024, or the model's")
    ] = None,
    packing: Annotated[bool, _of_data("--packing", help="Several examples in a sequence, apart.")] = False,
    gradient_checkpointing: Annotated[
        bool, _of_training("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    quantize: Annotated[Quantize | None, _of_adapter(help="Pack the frozen weights (bitsandbytes).")] = None,
    eval_share: Annotated[float, _of_data(min=0, max=0.5, help="Of the sequences, held out.")] = 0.05,
    seed: Annotated[int, _of_training(min=0, help="Of adapter, order, held-out part and masks.")] = 0,
    k: Annotated[int | None, _of_macdrop("-k", "--k", min=1, help="How many massive rows.", show_default="5")] = None,
    scope: Annotated[Scope | None, _of_macdrop(help="Rows dropped from.", show_default="massive")] = None,
    resample: Annotated[Resample | None, _of_macdrop(help="A mask for each of these.", show_default="step")] = None,
    massive: Annotated[Path | None, _of_macdrop(help="A saved scan; without it the model is scanned first.")] = None,
    event: Annotated[
        str | None, _of_macdrop(metavar="N[,N...]|all|up|down", help="Rows of these events of the scan, together.")
    ] = None,
    layer: Annotated[str | None, _of_macdrop(metavar="N[,N...]", help="Top rows of these layers, together.")] = None,
    expert: Annotated[int | None, _of_macdrop(min=0, help="With one layer or event: the routed expert.")] = None,
    indices: Annotated[
        str | None, _of_macdrop(metavar="I[,J...]", help="With one layer or event: these rows, in this order.")
    ] = None,
    allow_none: Annotated[
        bool, _of_macdrop("--allow-none", help="Train a model without massive weights, without MacDrop.")
    ] = False,
    merge: Annotated[bool, _of_adapter("--merge", help="Also write the sum as a full checkpoint, DIR/merged.")] = False,
    report_to: Annotated[list[str] | None, _of_run(help="tensorboard, wandb, ...; repeatable.")] = None,
    logging_steps: Annotated[
        int | None,
        _of_run(min=1, help="Steps from one logged loss to the next.", show_default="a hundredth, at most 10"),
    ] = None,
    save_steps: Annotated[
        int | None, _of_run(min=1, help="Steps from one checkpoint to the next.", show_default="a twentieth of the run")
    ] = None,
    resume: Annotated[bool, _of_run("--resume", help="Go on from the newest whole checkpoint in DIR.")] = False,
    dry_run: Annotated[bool, _of_run("--dry-run", help="Show the plan and stop.")] = False,
    show_curriculum: Annotated[bool, _of_run("--show-curriculum", help="Draw p over the steps and stop.")] = False,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: Annotated[
        DType, _of_model(help="Precision to train in; auto is bfloat16 where the hardware has it, else float32.")
    ] = DType.auto,
    device: Annotated[str, _of_model(help="auto, cpu, cuda, mps.")] = "auto",
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Train a LoRA or DoRA adapter with MacDrop."""
    curriculum = _curriculum(macdrop, k=k, scope=scope, resample=resample, seed=seed)
    if show_curriculum:
        _show_curriculum(curriculum, max_steps, epochs)
        return
    if data is None:
        raise typer.BadParameter("--data is missing: what is there to train on?")
    if output is None and not dry_run:
        raise typer.BadParameter("-o DIR is missing: where does the adapter go?")
    from mwtool.cli.terminal import quiet_libraries
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.plan import Asked
    from mwtool.models.source import locate

    quiet_libraries()
    place = process.training_device(device)
    recipe = Recipe(
        curriculum=curriculum,
        peft=peft.value,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(name.strip() for names in target_modules or () for name in names.split(",")),
        lr=lr,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        effective_batch=effective_batch,
        max_length=max_length,
        packing=packing,
        on_prompt=train_on_prompt,
        gradient_checkpointing=gradient_checkpointing,
        quantize=None if quantize is None else "4bit",
        eval_share=eval_share,
        seed=seed,
        dtype=process.training_precision(dtype, place),
    )
    form: Any = None if format_ is Format.auto else format_.value  # its values are the forms
    choice = options.chosen(massive=massive, event=event, layer=layer, expert=expert, indices=indices)
    if curriculum.layers and replace(choice, file=None) != type(choice)():
        raise typer.BadParameter(f"{macdrop} names layers; leave out --layer, --event, --expert and --indices")
    asked = Asked(data, form, split, skip_bad_rows, massive, allow_none, replace(choice, file=None))
    if output is not None and not dry_run and _ended(output, resume=resume):
        return
    source = locate(model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    plan = _planned(source, recipe, asked)
    if dry_run or output is None:
        _show_plan(plan, json=json)
        return
    from mwtool.finetune.trainer import Telling

    telling = Telling(logging_steps, save_steps, tuple(report_to or ()))
    _run(plan, output, place, telling, resume=resume, merge=merge, json=json)


def _curriculum(text: str, *, k: int | None, scope: Scope | None, resample: Resample | None, seed: int) -> Curriculum:
    """The curriculum of `--macdrop`, with what other flags say about it."""
    from mwtool.macdrop.curriculum_yaml import read_curriculum

    read = read_curriculum(text)
    changes: dict[str, Any] = {"k": k, "scope": scope and scope.value, "resample": resample and resample.value}
    if not text.endswith((".yaml", ".yml")):
        changes["seed"] = seed
    return replace(read, **{name: value for name, value in changes.items() if value is not None})


def _show_curriculum(curriculum: Curriculum, max_steps: int | None, epochs: float) -> None:
    """Without a model and without data: over --max-steps, else as many as the paper's runs had."""
    from mwtool.cli.terminal import note, report_console
    from mwtool.finetune.config import PAPER_STEPS
    from mwtool.finetune.report import curriculum_chart

    steps = max_steps or PAPER_STEPS
    if max_steps is None:
        note(f"over the {PAPER_STEPS} steps of the paper's runs; --max-steps says another number")
    console = report_console()
    console.print(curriculum_chart(curriculum, steps, math.ceil(steps / max(epochs, 1)), console.width))


def _ended(folder: Path, *, resume: bool) -> bool:
    """Whether there is nothing left to go on with. A new run needs a folder of its own: raises OutputError."""
    from mwtool.cli.terminal import note
    from mwtool.errors import OutputError
    from mwtool.files.atomic_write import check_free
    from mwtool.finetune.document import RECORD

    if resume and (folder / RECORD).exists():
        note(f"{folder} holds a run that has ended; there is nothing to go on with")
        return True
    if resume or not process.first():  # the first process looks, before it fills the folder
        return False
    try:
        check_free(folder)
    except OutputError as fault:
        advice = ", or go on with the run in it with --resume" if folder.is_dir() else ""
        raise OutputError(f"{fault}{advice}") from fault
    return False


def _planned(source: Source, recipe: Recipe, asked: Asked) -> Plan:
    from mwtool.cli.terminal import layer_progress, note_all
    from mwtool.finetune.plan import make_plan

    note_all(source.notes)
    with layer_progress() as on_layer:
        plan = make_plan(source, recipe, asked, processes=process.count(), on_layer=on_layer)
    note_all(plan.notes)
    return plan


def _show_plan(plan: Plan, *, json: bool) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.files.document import text_of
    from mwtool.finetune.document import plan_document
    from mwtool.finetune.memory import footprint
    from mwtool.finetune.report import plan_report

    needed = footprint(plan)
    if json:
        sys.stdout.write(text_of(plan_document(plan, needed)))
        return
    console = report_console()
    console.print(plan_report(plan, needed, console.width))


def _run(plan: Plan, folder: Path, device: str, telling: Telling, *, resume: bool, merge: bool, json: bool) -> None:
    from mwtool.cli.terminal import command_line, note, note_all, step_progress
    from mwtool.finetune.artifacts import leave
    from mwtool.finetune.checkpointing import newest
    from mwtool.finetune.document import finetune_document
    from mwtool.finetune.trainer import train, with_adapter

    settings = plan.settings()
    found, notes = newest(folder, settings) if resume else (None, ())
    note_all(notes)
    if resume:
        note(f"going on from {found.folder}" if found else f"{folder} has no whole checkpoint: starting at step 1")
    model = with_adapter(plan.source, plan.recipe, device)
    with step_progress() as on_step:
        trained = train(
            model,
            (plan.train, plan.held),
            plan.places,
            plan.recipe,
            folder,
            settings=settings,
            resume=found,
            telling=replace(telling, on_step=on_step),
            processes=plan.processes,
        )
    if trained.stopped_by is not None:
        note(f"stopped after step {trained.step} of {trained.steps}, which is saved; add --resume to go on")
        raise typer.Exit(128 + trained.stopped_by)
    if process.first():
        document = finetune_document(plan, trained, device=device, command=command_line())
        leave(document, trained, folder, merge=merge)
        _show(document, folder, json=json)


def _show(document: dict[str, Any], folder: Path, *, json: bool) -> None:
    from mwtool.cli.terminal import report_console
    from mwtool.files.document import text_of
    from mwtool.finetune.report import outcome_report

    if json:
        sys.stdout.write(text_of(document))
    else:
        report_console().print(outcome_report(document, str(folder)))
