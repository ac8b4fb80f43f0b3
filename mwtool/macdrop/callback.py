"""MacDrop inside `transformers.Trainer`, and in what builds on it, such as TRL's SFTTrainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mwtool.architecture.layout import DecoderLayer
from mwtool.errors import BadValue
from mwtool.interrupts import uninterrupted
from mwtool.macdrop.curriculum import Curriculum
from mwtool.macdrop.curriculum_yaml import read_curriculum
from mwtool.macdrop.engine import MacDrop

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from mwtool.massive import RankedRows


class MacDropCallback(TrainerCallback):
    """Drops entries in every training step of the trainer it is given to (Algorithm 1 of the paper).

    massive: which rows, as a scan finds them, of one layer or of several. curriculum: a line, a file's name, or a
    Curriculum; the paper's by default. layers: where the FFNs are; by default as the adapter installed for the model's
    type says.

    Masks at the beginning of an optimizer step and restores right after the optimizer's own step, so that logging,
    evaluation and saving see the pre-trained weights, whatever the order of the callbacks. Trainer tells callbacks of
    no exception: train inside `guard(trainer)` to have the weights restored then, too. Adds `macdrop_p` to what is
    logged.

    Raises BadValue for None in place of massive weights or a curriculum that cannot be read; when training begins,
    as `MacDrop` does, and BadValue for just-in-time checkpointing.
    """

    def __init__(
        self,
        massive: RankedRows | Sequence[RankedRows] | None,
        curriculum: Curriculum | str = "step:0.8",
        *,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> None:
        if massive is None:
            raise BadValue("the model has no massive weights; there is nothing for MacDrop to drop: train without it")
        self.massive, self.layers = massive, layers
        self.curriculum = read_curriculum(curriculum) if isinstance(curriculum, str) else curriculum
        self.engine: MacDrop | None = None

    def restore(self) -> None:
        """Put the rows back; does nothing between steps."""
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
        self.restore()  # Trainer may begin again by itself, with smaller batches
        self.engine = MacDrop(
            kwargs["model"],
            self.massive,
            self.curriculum,
            steps=state.max_steps,
            per_epoch=_steps_per_epoch(args, kwargs.get("train_dataloader")),
            layers=self.layers,
        )
        if args.torch_compile:  # the model is compiled after this event, or apart from the one seen here
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
        self.restore()  # not at the end of the step alone: other callbacks may act there first

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


@contextmanager
def guard(trainer: Trainer) -> Iterator[Trainer]:
    """Restores what the trainer's MacDrop callbacks have dropped when the block ends, by an exception or Ctrl-C too.

    It also moves them before all others, so that TensorBoard and its like are given `macdrop_p`, too.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, MacDropCallback))
    try:
        try:
            yield trainer
        finally:
            _restore(callbacks)
    finally:
        _restore(callbacks)  # nothing, unless Ctrl-C came before the first had begun


def _restore(callbacks: Sequence[TrainerCallback]) -> None:
    for callback in callbacks:
        if isinstance(callback, MacDropCallback):
            uninterrupted(callback.restore)


def _steps_per_epoch(args: TrainingArguments, loader: Any) -> int | None:
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:  # a stream has no length; nor has no loader
        return None
