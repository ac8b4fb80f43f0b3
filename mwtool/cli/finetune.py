"""`mwtool finetune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mwtool.cli import options, process
from mwtool.cli.command import MODEL, REQUIRED, Command
from mwtool.cli.commands import single
from mwtool.cli.curricula import curricula_of, only, show_curricula
from mwtool.cli.finetune_run import Run, batch_of, drawn, locating, needed, pushing, without_layers
from mwtool.finetune.config import KEPT, LENGTH, Asked, Peft, Quantize, Recipe
from mwtool.macdrop.curriculum import Resample, Scope
from mwtool.models.load_options import DType

Format = Literal["auto", "alpaca", "messages", "text"]
"""`auto` and the forms of `mwtool.finetune.data`."""
DEFAULTS, ASKED = Recipe(), Asked(data="")
CURRICULUM = DEFAULTS.curriculum
EXAMPLES = """\
mwtool finetune ./model --data alpaca.json -o adapter
mwtool finetune ./model --data alpaca.json --dry-run
mwtool finetune ./model --data OWNER/NAME -o adapter --load-in-4bit --lora-r 8
mwtool finetune --macdrop exp:0.8 --show-curriculum
"""

_required = partial(typer.Option, rich_help_panel=REQUIRED)
_of_data = partial(typer.Option, rich_help_panel="Data")
_of_adapter = partial(typer.Option, rich_help_panel="PEFT adapter")
_of_macdrop = partial(typer.Option, rich_help_panel="MacDrop")
_of_training = partial(typer.Option, rich_help_panel="Training")
_of_run = partial(typer.Option, rich_help_panel="Run")
_of_model = partial(typer.Option, rich_help_panel=MODEL)


def finetune(
    model: options.BaseModel = "demo",
    data: Annotated[
        str | None,
        _required(
            "--data",
            metavar="DATA",
            help="Training data: a JSON, JSONL, Parquet or text file, a folder of them, or a dataset on the Hub, "
            "OWNER/NAME[:CONFIG]. Not needed with --show-curriculum.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _required(
            "--output-dir",
            "--output",
            "-o",
            metavar="DIR",
            help="Where to save the PEFT adapter; a new or empty folder. Not needed with --dry-run.",
        ),
    ] = None,
    format_: Annotated[
        Format, _of_data("--format", help="Format of the records; auto recognizes it by their keys.")
    ] = ASKED.form or "auto",
    split: Annotated[str, _of_data(metavar="NAME", help="Split of a dataset on the Hub or of a folder.")] = ASKED.split,
    skip_bad_rows: Annotated[
        bool, _of_data("--skip-bad-rows", help="Skip records that cannot be read instead of stopping.")
    ] = ASKED.skip_bad,
    chat_template: Annotated[
        str | None,
        _of_data(
            metavar="NAME|FILE",
            help="Chat template: one of the tokenizer's by name, or a Jinja file.",
            show_default="the tokenizer's default",
        ),
    ] = ASKED.chat_template,
    train_on_prompt: Annotated[
        bool, _of_data("--train-on-prompt", help="Compute the loss on prompts too, not only on answers.")
    ] = DEFAULTS.on_prompt,
    max_length: Annotated[
        int | None,
        _of_data(
            min=2, metavar="N", help="Tokens in a sequence.", show_default=f"{LENGTH}, or the model's limit if less"
        ),
    ] = DEFAULTS.max_length,
    packing: Annotated[
        bool, _of_data("--packing", help="Put several examples into a sequence; they do not see each other.")
    ] = DEFAULTS.packing,
    eval_share: Annotated[
        float, _of_data(min=0, max=0.5, metavar="X", help="Share of the sequences held out for evaluation.")
    ] = DEFAULTS.eval_share,
    macdrop: Annotated[
        list[str] | None,
        _of_macdrop(
            metavar="SCHEDULE",
            help="Dropout schedule, such as step:0.8, a curriculum FILE.yaml, or none to train without MacDrop; "
            "repeatable with --show-curriculum.",
            show_default=str(CURRICULUM),
        ),
    ] = None,
    k: Annotated[
        int | None,
        _of_macdrop(
            "-k",
            "--k",
            min=1,
            max=2**31 - 1,
            metavar="N",
            help="How many massive rows.",
            show_default=str(CURRICULUM.k),
        ),
    ] = None,
    scope: Annotated[
        Scope | None, _of_macdrop(help="Rows whose entries are dropped.", show_default=CURRICULUM.scope)
    ] = None,
    resample: Annotated[
        Resample | None, _of_macdrop(help="How often a new mask is drawn.", show_default=CURRICULUM.resample)
    ] = None,
    massive: Annotated[
        Path | None,
        _of_macdrop(
            metavar="FILE", help="Take the rows from a saved scan (mwtool scan -o FILE) instead of scanning the model."
        ),
    ] = ASKED.massive,
    event: Annotated[
        str | None,
        _of_macdrop(metavar="N,...|all|up|down", help="Take the rows of these events of the scan, together."),
    ] = None,
    layer: Annotated[
        str | None, _of_macdrop(metavar="N,...", help="Take the top rows of these layers, together (from 0).")
    ] = None,
    expert: Annotated[
        int | None, _of_macdrop(min=0, metavar="N", help="With one layer or event: rows of this routed expert.")
    ] = None,
    indices: Annotated[
        str | None, _of_macdrop(metavar="I,J,...", help="With one layer or event: these rows, in this order.")
    ] = None,
    allow_none: Annotated[
        bool,
        _of_macdrop("--allow-none", help="If the model has no massive weights, train it without MacDrop."),
    ] = ASKED.allow_none,
    peft: Annotated[Peft, _of_adapter(help="Type of the PEFT adapter.")] = DEFAULTS.peft,
    rank: Annotated[
        int,
        _of_adapter("--lora-r", "--rank", min=1, max=1_000_000, metavar="N", help="Rank of the adapter."),
    ] = (DEFAULTS.rank),
    alpha: Annotated[
        int, _of_adapter("--lora-alpha", "--alpha", min=1, metavar="N", help="The adapter is scaled by alpha / rank.")
    ] = DEFAULTS.alpha,
    dropout: Annotated[
        float, _of_adapter("--lora-dropout", "--dropout", min=0, max=1, metavar="X", help="Dropout on the LoRA input.")
    ] = DEFAULTS.dropout,
    target_modules: Annotated[
        list[str] | None,
        _of_adapter(
            metavar="NAME",
            help="Modules to adapt; repeatable, or a,b.",
            show_default="all linear layers except the output head",
        ),
    ] = None,
    quantize: Annotated[
        Quantize | None,
        _of_adapter(help="Quantize the frozen weights with bitsandbytes; --load-in-4bit does the same."),
    ] = DEFAULTS.quantize,
    merge: Annotated[
        bool, _of_adapter("--merge", help="Also save the merged model as a full checkpoint in DIR/merged.")
    ] = False,
    lr: Annotated[
        float,
        _of_training(
            "--learning-rate",
            "--lr",
            min=0,
            callback=options.finite,
            metavar="X",
            help="Learning rate after warm-up; it decays linearly to 0.",
        ),
    ] = DEFAULTS.lr,
    warmup: Annotated[
        float,
        _of_training("--warmup-ratio", "--warmup", min=0, max=1, metavar="X", help="Warm-up, as a share of the steps."),
    ] = DEFAULTS.warmup,
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
    ] = DEFAULTS.epochs,
    max_steps: Annotated[
        int | None, _of_training(min=1, max=10_000_000, metavar="N", help="Optimizer steps; overrides epochs.")
    ] = DEFAULTS.max_steps,
    batch_size: Annotated[
        str,
        _of_training(
            metavar="N|auto",
            help="Sequences per device in one forward pass; auto: the largest number that fits, found by trial steps.",
        ),
    ] = str(DEFAULTS.batch_size),
    effective_batch: Annotated[
        int,
        _of_training(
            min=1,
            metavar="N",
            help="Sequences per optimizer step over all devices; gradients are accumulated to reach it.",
        ),
    ] = DEFAULTS.effective_batch,
    gradient_checkpointing: Annotated[
        bool | None,
        _of_training(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Recompute activations: less memory, more time.",
            show_default="only if nothing fits without",
        ),
    ] = DEFAULTS.gradient_checkpointing,
    padding_free: Annotated[
        bool | None,
        _of_training(
            "--padding-free/--no-padding-free",
            help="Put the sequences of a forward pass behind each other without padding; they do not see each other.",
            show_default="on a GPU, if a trial shows that they do not",
        ),
    ] = DEFAULTS.padding_free,
    group_by_length: Annotated[
        bool,
        _of_training("--group-by-length", help="Batches of sequences of similar length: less padding."),
    ] = DEFAULTS.group_by_length,
    torch_compile: Annotated[
        bool, _of_training("--torch-compile", help="Compile the model (torch.compile).")
    ] = DEFAULTS.torch_compile,
    use_liger_kernel: Annotated[
        bool, _of_training("--use-liger-kernel", help="Use Liger's kernels; needs a GPU and the package liger_kernel.")
    ] = DEFAULTS.use_liger_kernel,
    seed: Annotated[
        int,
        _of_training(
            min=0,
            metavar="N",
            callback=options.a_seed,
            help="Seed of adapter weights, data order, held-out part and masks.",
        ),
    ] = DEFAULTS.seed,
    report_to: Annotated[
        list[str] | None,
        _of_run(metavar="NAME", help="Log to tensorboard, wandb or another logger of the Trainer; repeatable."),
    ] = None,
    logging_steps: Annotated[
        int | None,
        _of_run(min=1, metavar="N", help="Log the loss every N steps.", show_default="1% of the run, at most 10"),
    ] = None,
    save_steps: Annotated[
        int | None,
        _of_run(min=1, metavar="N", help="Save a checkpoint every N steps.", show_default="5% of the run"),
    ] = None,
    save_total_limit: Annotated[
        int, _of_run(min=KEPT, metavar="N", help="Keep the last N checkpoints, such as all for mwtool track.")
    ] = KEPT,
    resume: Annotated[bool, _of_run("--resume", help="Continue from the newest complete checkpoint in DIR.")] = False,
    dry_run: Annotated[bool, _of_run("--dry-run", help="Show the plan and the memory it takes, and stop.")] = False,
    trial: Annotated[
        bool, _of_run("--trial", help="With --dry-run: also train a few steps, for time and measured memory.")
    ] = False,
    show_curriculum: Annotated[
        bool, _of_run("--show-curriculum", help="Draw the dropout probability over the steps and stop.")
    ] = False,
    plot: Annotated[
        Path | None,
        _of_run(
            metavar="FILE", help="Draw loss and p over the steps, with --show-curriculum p alone (.png, .svg or .pdf)."
        ),
    ] = None,
    gguf_file: options.GGUFFile = None,
    revision: options.Revision = None,
    dtype: Annotated[
        DType,
        _of_model(help="Precision to train in; auto is bfloat16 where the hardware supports it, else float32."),
    ] = "auto",
    device: Annotated[str, _of_model(metavar="DEVICE", help="Where to train: auto, cpu, cuda or mps.")] = "auto",
    trust_remote_code: options.Trust = False,
    json: options.Json = False,
    report: options.Page = None,
    table: options.TableFile = None,
    push_to_hub: options.PushToHub = None,
    hub_private_repo: options.HubPrivate = False,
    config: options.Config = None,
    debug: options.Debug = False,
) -> None:
    """Train a LoRA or DoRA adapter with MacDrop."""
    curricula = curricula_of(macdrop or [str(CURRICULUM)], k=k, scope=scope, resample=resample, seed=seed)
    outputs = drawn(plot, report, table, dry_run=dry_run, trial=trial, show_curriculum=show_curriculum)
    if show_curriculum:
        show_curricula(curricula, max_steps, epochs, plot)
        return
    curriculum, data, place = only(curricula), needed(data, output, dry_run=dry_run), process.training_device(device)
    recipe = Recipe(
        curriculum=curriculum,
        peft=peft,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(name.strip() for names in target_modules or () for name in names.split(",")),
        lr=lr,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_of(batch_size),
        effective_batch=effective_batch,
        max_length=max_length,
        packing=packing,
        on_prompt=train_on_prompt,
        gradient_checkpointing=gradient_checkpointing,
        padding_free=padding_free,
        group_by_length=group_by_length,
        torch_compile=torch_compile,
        use_liger_kernel=use_liger_kernel,
        quantize=quantize,
        eval_share=eval_share,
        seed=seed,
        dtype=process.training_precision(dtype, place),
    )
    choice = options.chosen(massive=massive, event=event, layer=layer, expert=expert, indices=indices)
    Run(
        locating=partial(locating, model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file),
        recipe=recipe,
        asked=Asked(
            data=data,
            form=None if format_ == "auto" else format_,
            split=split,
            skip_bad=skip_bad_rows,
            chat_template=chat_template,
            massive=massive,
            allow_none=allow_none,
            choice=without_layers(choice, curriculum, "".join(macdrop or ())),
        ),
        output=None if dry_run else output,
        device=place,
        reporting=_telling(logging_steps, save_steps, save_total_limit, report_to),
        outputs=outputs,
        resume=resume,
        merge=merge,
        push=pushing(push_to_hub, private=hub_private_repo, dry_run=dry_run),
        json=json,
    ).start(trial=trial)


def _telling(logging_steps: int | None, save_steps: int | None, kept: int, loggers: list[str] | None) -> dict[str, Any]:
    """The fields of `Telling`, which imports torch."""
    return {
        "logging_steps": logging_steps,
        "save_steps": save_steps,
        "save_total_limit": kept,
        "loggers": tuple(loggers or ()),
    }


app = single()
app.command("finetune", cls=Command, epilog=EXAMPLES, options_metavar="--data DATA -o DIR [OPTIONS]")(finetune)
