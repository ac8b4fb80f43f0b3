"""MacDrop as a callback for `transformers.Trainer` and trainers built on it, such as TRL's SFTTrainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mwtool.architecture.layout import DecoderLayer
from mwtool.errors import BadValue
from mwtool.interrupts import restored, uninterrupted
from mwtool.macdrop.curriculum import Curriculum
from mwtool.macdrop.curriculum_yaml import read_curriculum
from mwtool.macdrop.engine import MacDrop

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from mwtool.massive import RankedRows


class MacDropCallback(TrainerCallback):
    """A Trainer callback that drops entries of the massive rows in every training step (paper, Algorithm 1).

    massive: the rows of one layer or of several, as found by a scan. curriculum: a schedule such as ``step:0.8`` (the
    default, the paper's), the name of a YAML file, or a Curriculum. layers: decoder layers and their FFNs; by default,
    as described by the architecture adapter installed for the model's type.

    Entries are masked when an optimizer step begins and restored right after `optimizer.step()`, so that logging,
    evaluation and saving see the pre-trained weights whatever the order of the callbacks. Trainer does not notify
    callbacks of exceptions: train inside `guard(trainer)` to restore the weights after one. The probability is
    logged as `macdrop_p`.

    Raises BadValue if massive is None or the curriculum cannot be read. When training begins, raises what `MacDrop`
    raises, and BadValue for just-in-time checkpointing.
    """

    def __init__(
        self,
        massive: RankedRows | Sequence[RankedRows] | None,
        curriculum: Curriculum | str = "step:0.8",
        *,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> None:
        if massive is None:
            raise BadValue("the model has no massive weights for MacDrop to drop; train without MacDrop")
        self.massive, self.layers = massive, layers
        self.curriculum = read_curriculum(curriculum) if isinstance(curriculum, str) else curriculum
        self.engine: MacDrop | None = None

    def restore(self) -> None:
        """Restore the rows. Does nothing between steps."""
        if self.engine is not None:
            self.engine.restore()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args, "enable_jit_checkpoint", False):
            raise BadValue(
                "just-in-time checkpointing saves before the optimizer step, while entries are dropped; "
                "set enable_jit_checkpoint to False to train with MacDrop"
            )
        self.restore()  # Trainer may restart by itself with a smaller batch size
        self.engine = MacDrop(
            kwargs["model"],
            self.massive,
            self.curriculum,
            steps=state.max_steps,
            per_epoch=_steps_per_epoch(args, kwargs.get("train_dataloader")),
            layers=self.layers,
        )
        if args.torch_compile:  # the model is compiled after this event, or is not the object passed here
            self.engine.refuse_compiled()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().begin(state.global_step + 1)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().next_microbatch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()  # before on_step_end, where other callbacks may run first

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.restore()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if self.engine is not None and logs is not None and "loss" in logs:
            logs["macdrop_p"] = self.engine.p
            if state.log_history:
                state.log_history[-1]["macdrop_p"] = self.engine.p

    def _running(self) -> MacDrop:
        assert self.engine is not None, "Trainer begins training before its steps"
        return self.engine


@restored
def guard(trainer: Trainer) -> Iterator[Trainer]:
    """Restore the rows of the trainer's MacDrop callbacks when the block ends, also after an exception or Ctrl-C.

    The callbacks are moved before all others, so that loggers such as TensorBoard receive `macdrop_p`.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, MacDropCallback))
    try:
        try:
            yield trainer
        finally:
            _restore(callbacks)
    finally:
        _restore(callbacks)  # does something only if Ctrl-C came before the first call began


def _restore(callbacks: Sequence[TrainerCallback]) -> None:
    for callback in callbacks:
        if isinstance(callback, MacDropCallback):
            uninterrupted(callback.restore)


def _steps_per_epoch(args: TrainingArguments, loader: Any) -> int | None:
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:  # a streaming data loader has no length, nor has None
        return None
