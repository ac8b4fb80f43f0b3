"""A LoRA or DoRA run with MacDrop: transformers' Trainer trains it, PEFT holds it."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from mwtool.errors import BadValue, UnsupportedModel, line_of
from mwtool.files.atomic_write import permissions
from mwtool.finetune.batch_size import fitted
from mwtool.finetune.checkpointing import Checkpoint, clear
from mwtool.finetune.config import CHECKPOINTS, KEPT, Recipe
from mwtool.finetune.loss import trained_head
from mwtool.finetune.monitor import NothingLeft, Step, Watch
from mwtool.finetune.padding_free import flattened, rows
from mwtool.finetune.resource_errors import explained
from mwtool.finetune.sequences import Encoded, collate
from mwtool.finetune.signals import StopAtStepEnd
from mwtool.finetune.token_trainer import TokenTrainer
from mwtool.macdrop.callback import MacDropCallback, guard
from mwtool.massive import RankedRows
from mwtool.models.compiler import explained_for
from mwtool.models.load import load
from mwtool.models.source import Source

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run gave.

    step: the last one done; less than `steps` if a signal (`stopped_by`, its number) ended it. history: p of every
    step, by step. log: Trainer's, with an entry for each logged loss and held-out loss. step_seconds: median over the
    steps of this process; None if it did none. macdrop_seconds: what MacDrop took of a step, the mean over these
    steps; None without MacDrop. how: the way MacDrop masked the rows, `weights` or `outputs`, and rows:
    which rows; None and empty without MacDrop.
    """

    model: PeftModel
    step: int
    steps: int
    history: dict[int, float]
    log: tuple[dict[str, Any], ...]
    step_seconds: float | None
    macdrop_seconds: float | None
    how: str | None
    rows: tuple[int, ...]
    stopped_by: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """What is reported and saved during training, and where.

    save_total_limit: checkpoints that stay, at least `KEPT`.
    loggers: names of Trainer's `report_to`.
    """

    logging_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = KEPT
    loggers: tuple[str, ...] = ()
    on_step: Callable[[Step], None] | None = None


def train(
    model: PeftModel,
    data: tuple[Encoded, Encoded | None],
    massive: RankedRows | Sequence[RankedRows] | None,
    recipe: Recipe,
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    resume: Checkpoint | None = None,
    telling: Telling | None = None,
    processes: int = 1,
) -> Trained:
    """Train the adapter and save it to `folder`, with its checkpoints; without massive weights, without MacDrop.

    data: what to train on, and what to hold out. settings: what a run that continues from the checkpoints must have.
    resume: the checkpoint to continue from. If that is of the last step, the adapter is taken from it.
    Raises OutputError if they cannot be written, MwtoolError if memory runs out or the loss is not finite.
    """
    telling = telling or Telling()
    with explained(recipe, folder, None):
        recipe = fitted(model, data[0], recipe, processes=processes)
    macdrop = None if not massive or recipe.curriculum.idle else MacDropCallback(massive, recipe.curriculum)
    before = {} if resume is None else resume.history
    watch, stop = Watch(macdrop, settings or {}, before, telling.on_step), StopAtStepEnd()
    counts = recipe.steps(len(data[0]), processes)
    device = next(model.parameters()).device.type
    arguments = _arguments(recipe, folder, telling, counts=counts, processes=processes, device=device)
    arguments.eval_on_start = resume is None and bool(recipe.eval_share)
    callbacks = [*([macdrop] if macdrop else []), stop, watch]
    trainer = _trainer(model, arguments, data, callbacks, padding_free=bool(recipe.padding_free))
    if resume is not None and arguments.should_save:
        clear(folder, resume.step)
    compiling = explained_for("--torch-compile") if recipe.torch_compile else nullcontext()
    with guard(trainer), stop.listening(), explained(recipe, folder, watch), compiling:
        if trainer.trained_head is not None and not recipe.torch_compile:  # a compiled model does not see the hook
            trainer.trained_head.narrow_if_same()
        with suppress(NothingLeft), rows(model, recipe.dtype) if recipe.padding_free else nullcontext():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
        done = trainer.state.global_step
        if done >= counts[0]:
            _save_adapter(trainer, folder)
    engine = None if macdrop is None else macdrop.engine
    return Trained(
        model=model,
        step=done,
        steps=counts[0],
        history=watch.history,
        log=tuple(trainer.state.log_history),
        step_seconds=watch.step_seconds,
        macdrop_seconds=None if engine is None or not watch.seconds else engine.seconds / len(watch.seconds),
        how=None if engine is None else engine.how,
        rows=() if engine is None else tuple(engine.rows),
        stopped_by=stop.received if done < counts[0] else None,
    )


def check_loggers(names: Sequence[str]) -> None:
    """Raise BadValue if one of `--report-to` is unknown, before anything is loaded."""
    try:
        get_reporting_integration_callbacks([name for name in names if name not in {"all", "none"}])
    except ValueError as fault:
        raise BadValue(f"--report-to {', '.join(names)}: {line_of(fault, whole=True)}") from fault


def _trainer(
    model: PeftModel,
    arguments: TrainingArguments,
    data: tuple[Any, Any],
    callbacks: list[TrainerCallback],
    *,
    padding_free: bool,
) -> TokenTrainer:
    try:
        trainer = TokenTrainer(
            model=model,
            args=arguments,
            train_dataset=data[0],
            eval_dataset=data[1],
            callbacks=callbacks,
            head=trained_head(model),
            collator=flattened if padding_free else collate,
        )
    except (ValueError, RuntimeError, ImportError) as fault:  # a logger that is unknown, or not installed
        if not arguments.report_to:
            raise
        raise BadValue(f"--report-to {', '.join(arguments.report_to)}: {line_of(fault, whole=True)}") from fault
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_adapter(source: Source, recipe: Recipe, device: str) -> PeftModel:
    """The model with a fresh adapter, which is drawn with the recipe's seed.

    Raises BadValue where the target modules do not exist.
    """
    from transformers import set_seed

    options: dict[str, Any] = {}
    if recipe.quantize is not None:
        options["quantization_config"] = _four_bit(recipe)
    loaded = _whole(source, recipe.dtype, device, options)
    if recipe.packing:
        refuse_mixing(loaded)
    loaded.config.use_cache = False
    set_seed(recipe.seed)
    if recipe.quantize is not None:
        from peft import prepare_model_for_kbit_training

        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)  # Trainer sees to that
        for module in loaded.modules():  # evaluating would repack weights in a layout with no way back for gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return adapted(loaded, source, recipe)


def adapted(model: Any, source: Source, recipe: Recipe) -> PeftModel:
    """The model wrapped by PEFT. Raises BadValue where the target modules do not exist."""
    from peft import LoraConfig, get_peft_model

    chosen = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules) or "all-linear",
        use_dora=recipe.peft == "dora",
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.reference,
        revision=source.revision,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed", UserWarning)
            wrapped: PeftModel = get_peft_model(model, chosen)
    except ValueError as fault:
        raise BadValue(f"no adapter can be put on {source.name}: {line_of(fault, whole=True)}") from fault
    wrapped.peft_config["default"].base_model_name_or_path = source.reference  # PEFT takes a path as it was typed
    return wrapped


def _whole(source: Source, dtype: str, device: str, options: dict[str, Any]) -> Any:
    """The pre-trained model in the precision of training."""
    return load(
        source.name,
        revision=source.revision,
        dtype=dtype,
        device=device,
        trust_remote_code=source.trust_remote_code,
        gguf_file=source.gguf_file,
        model_options=options,
    ).base


def refuse_mixing(model: Any) -> None:
    """Raise UnsupportedModel if packed examples see each other: if what the second gives depends on the first."""
    device, size = model.get_input_embeddings().weight.device, min(model.config.get_text_config().vocab_size, 16)
    places = torch.arange(8, device=device).repeat(2)[None]
    given = []
    for first in (torch.arange(8), torch.arange(8).flip(0)):
        ids = (torch.cat([first, torch.arange(8)]) % size).to(device)[None]
        with torch.inference_mode():
            given.append(model(input_ids=ids, position_ids=places, use_cache=False).logits[0, 8:].float())
    if float((given[0] - given[1]).abs().max()) > 1e-3 * float(given[0].abs().max()):
        raise UnsupportedModel(f"{model.config.model_type} lets packed examples see each other; leave out --packing")


def _four_bit(recipe: Recipe) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
    )


def _save_adapter(trainer: Trainer, folder: Path) -> None:
    """The adapter as PEFT writes it, gathered if it is sharded; every file is complete or absent."""
    temporary = folder / ".adapter.incomplete"
    trainer.save_model(str(temporary))  # in all processes
    if trainer.args.should_save:
        permissions(temporary)
        for file in temporary.iterdir():
            if file.name != "training_args.bin":  # a pickle nobody needs to load the adapter
                file.replace(folder / file.name)
        shutil.rmtree(temporary)
    # the others only send their parts of a sharded model: if one exits before they are sent, the first waits forever
    trainer.accelerator.wait_for_everyone()


def _arguments(
    recipe: Recipe, folder: Path, telling: Telling, *, counts: tuple[int, int], processes: int, device: str
) -> TrainingArguments:
    steps, per_epoch = counts
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.at_once,
        per_device_eval_batch_size=recipe.at_once,
        gradient_accumulation_steps=recipe.accumulation(processes),
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup if recipe.warmup < 1 else steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16",
        logging_steps=telling.logging_steps or min(10, max(1, steps // 100)),
        logging_nan_inf_filter=False,  # what is not finite is to be seen
        save_strategy="steps",
        save_steps=telling.save_steps or math.ceil(steps / CHECKPOINTS),
        save_total_limit=telling.save_total_limit,
        # by steps and not by epochs: it then comes before a checkpoint is saved, and a resumed run misses none
        eval_strategy="steps" if recipe.eval_share else "no",
        eval_steps=per_epoch,
        report_to=list(telling.loggers) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        torch_compile=recipe.torch_compile,
        use_liger_kernel=recipe.use_liger_kernel,
        **_checkpointing(recipe),
    )
    made._n_gpu = min(made.n_gpu, 1)  # noqa: SLF001 - several cards are several processes; never DataParallel
    return made


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    if not recipe.gradient_checkpointing:
        return {}
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
