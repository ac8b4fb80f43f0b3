"""What is kept and told of a run while Trainer trains: p of every step, whole checkpoints, where it stands."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mwtool.errors import MwtoolError
from mwtool.finetune.checkpointing import mark
from mwtool.macdrop.callback import MacDropCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a run stands.

    loss: the last one logged; p: of the step; seconds: of the step; mean: seconds of a step so far, evaluations and
    saves included. logged: whether the loss is new.
    """

    step: int
    steps: int
    loss: float | None
    p: float | None
    seconds: float
    mean: float
    logged: bool = False


class NothingLeft(Exception):
    """A run that continues from the checkpoint of its last step ends before it trains.

    Trainer takes a step before it counts them, if that checkpoint lies inside an epoch.
    """


class Watch(TrainerCallback):
    """To be called after MacDrop's callback, whose p it keeps.

    settings: written into every checkpoint. before: p of the steps before this process, if it resumed.
    """

    def __init__(
        self,
        macdrop: MacDropCallback | None,
        settings: dict[str, Any],
        before: dict[int, float],
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.macdrop, self.settings, self.before, self.on_step = macdrop, settings, before, on_step
        self.step = 0
        self.began = self.first = 0.0
        self.loss: float | None = None
        self.seconds: list[float] = []

    @property
    def history(self) -> dict[int, float]:
        """p of every step, by step; empty without MacDrop."""
        engine = None if self.macdrop is None else self.macdrop.engine
        return {**self.before, **({} if engine is None else engine.history)}

    @property
    def step_seconds(self) -> float | None:
        """Median over this process's steps; None if it did none."""
        return statistics.median(self.seconds) if self.seconds else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # those of this command and not of the checkpoint it resumed from
        state.save_steps, state.logging_steps = int(args.save_steps), int(args.logging_steps)
        self.step, self.first = state.global_step, time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.step = time.perf_counter(), state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self._tell(state, logged=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise MwtoolError(
                f"the loss is {loss} at step {state.global_step}: lower --lr, or train in --dtype float32"
            )
        self.loss = loss
        self._tell(state, logged=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            mark(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.settings, self.history)

    def _tell(self, state: TrainerState, *, logged: bool) -> None:
        if self.on_step is not None and self.seconds and state.is_world_process_zero:
            p = None if self.macdrop is None or self.macdrop.engine is None else self.macdrop.engine.p
            mean = (time.perf_counter() - self.first) / len(self.seconds)
            self.on_step(
                Step(
                    step=state.global_step,
                    steps=state.max_steps,
                    loss=self.loss,
                    p=p,
                    seconds=self.seconds[-1],
                    mean=mean,
                    logged=logged,
                )
            )
