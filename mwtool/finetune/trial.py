"""A few steps of a training run that is planned, for what they take."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mwtool.finetune.batch_size import fitted, in_precision
from mwtool.finetune.config import CHECKPOINTS
from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.sequences import collate
from mwtool.finetune.trainer import Telling, train, with_adapter
from mwtool.models.peak_memory import gpu_peak, process_peak

if TYPE_CHECKING:
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.monitor import Step
    from mwtool.finetune.plan import Plan

STEPS = 4
"""Of the trial; the first of them pays for what is made once."""
SAVED = 2
"""Steps from one checkpoint of the trial to the next; the last step is one that ends with a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a few steps took. All times are in seconds.

    recipe: with what the trial found to fit. besides: loading and whatever else a run does once, a checkpoint among it.
    step: of the optimizer. saving: of one checkpoint. evaluation: of all that is held out, once. process, gpu: bytes
    at most. took: the trial itself.
    """

    recipe: Recipe
    besides: float
    step: float
    saving: float
    evaluation: float
    process: int | None
    gpu: int | None
    took: float

    def total(self, steps: int, per_epoch: int) -> float:
        """Seconds of a whole run from here. steps, per_epoch: of the optimizer."""
        saved = math.ceil(steps / math.ceil(steps / CHECKPOINTS))
        evaluated = 1 + steps // per_epoch if self.evaluation else 0  # once before the first step
        return self.besides + steps * self.step + (saved - 1) * self.saving + evaluated * self.evaluation


def tried(plan: Plan, device: str) -> Trial:
    """Load the model and train a few steps, of which nothing stays. Raises MwtoolError where training would."""
    start, ends = time.perf_counter(), list[float]()
    model = with_adapter(plan.source, plan.recipe, device)
    recipe = fitted(model, plan.train, plan.recipe, processes=plan.processes)
    few = replace(recipe, max_steps=min(STEPS, plan.steps), eval_share=0.0)

    def on_step(at: Step) -> None:
        if not at.logged:
            if device.startswith("cuda"):
                torch.cuda.synchronize()  # what is queued belongs to this step
            ends.append(time.perf_counter())
            seconds.append(at.seconds)

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        telling = Telling(save_steps=SAVED, on_step=on_step)
        train(model, (plan.train, None), plan.places, few, Path(folder), telling=telling, processes=plan.processes)
        ended = time.perf_counter()
    step, saving = step_and_saving(ends, seconds)
    process, gpu = process_peak(), gpu_peak()
    return Trial(
        recipe=recipe,
        besides=max(0.0, ended - start - len(ends) * step - (len(ends) // SAVED - 1) * saving),
        step=step,
        saving=saving,
        evaluation=_evaluation(model, plan, recipe, device),
        process=process,
        gpu=gpu,
        took=time.perf_counter() - start,
    )


def step_and_saving(ends: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of a step, and of a checkpoint. ends: when each step ended; seconds: its own, without what lies between.

    From one end to the next it takes a step, and a checkpoint where one is saved between them: after each `SAVED`.
    """
    between = list(pairwise(ends))
    with_saving = [after - before for at, (before, after) in enumerate(between, 1) if at % SAVED == 0]
    without = [after - before for at, (before, after) in enumerate(between, 1) if at % SAVED]
    step = statistics.median(without or seconds)
    return step, max(0.0, statistics.median(with_saving) - step) if with_saving else 0.0


def _evaluation(model: Any, plan: Plan, recipe: Recipe, device: str) -> float:
    """Seconds of all that is held out, from its first micro-batch."""
    if plan.held is None or not len(plan.held):
        return 0.0
    some = range(min(recipe.at_once, len(plan.held)))
    batch = {name: value.to(device) for name, value in collate([plan.held[at] for at in some]).items()}
    labels, head = batch.pop("labels"), TrainedHead(model)
    model.eval()
    with torch.no_grad(), in_precision(recipe, torch.device(device).type):
        for _ in range(2):  # the first pays for what is made once
            start = time.perf_counter()
            head.sums(model(**batch), labels).cpu()
            took = time.perf_counter() - start
    return took * len(plan.held) / len(some)
