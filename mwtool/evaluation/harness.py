"""lm-evaluation-harness on the loaded model, for its own tasks.

Every context begins with bos exactly once, whatever the tokenizer does by default;
log-probabilities are computed in float32; the batch size is the one given.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from mwtool.errors import BadValue, line_of, nearest
from mwtool.evaluation.config import Options
from mwtool.evaluation.harness_results import harness_metrics
from mwtool.evaluation.measurement import BATCH, Measured, OnProgress, bos_for, bos_notes, tokenizer_for
from mwtool.evaluation.tasks import Task
from mwtool.files.hub_dataset import load_from_hub
from mwtool.models.context import positions
from mwtool.models.load import Loaded

if TYPE_CHECKING:
    from mwtool.evaluation.harness_model import Model


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task, group or tag of the harness."""

    task: Task
    loaded: dict[str, Any]
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Every metric of every task of that name, and of the group. Raises BadValue if the harness fails."""
        from lm_eval.evaluator import evaluate

        start = time.perf_counter()
        _seed(options.seed)
        for task in self.loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=options.seed)
        try:
            with _quiet():
                model = _model(loaded, options, on_progress)
                found = evaluate(model, self.loaded, limit=options.limit, bootstrap_iters=0)
        except (AssertionError, ValueError, IndexError, ImportError) as fault:
            raise BadValue(f"{self.task}: lm-evaluation-harness failed: {line_of(fault, whole=True)}") from fault
        assert found is not None, "one process"
        setting = {**self.setting, "shortened": model.shortened}
        return list(harness_metrics(found, str(self.task), time.perf_counter() - start, setting))


def prepare_harness(loaded: Loaded, task: Task, options: Options, name: str | None = None) -> HarnessTask:
    """Load a task and its data. name: what the harness calls it, if not by the name of the task.

    Raises BadValue for an unknown name, ModelNotFound if the data cannot be loaded.
    """
    tokenizer_for(loaded, task)
    bos, name = bos_for(loaded, options), name or task.target
    check_name(task, name)
    local = "use a local file with mc:FILE.jsonl or cloze:FILE.jsonl"
    try:
        with _quiet():
            data = load_from_hub(f"{task}: the dataset of {name}", lambda: _manager().load(name), local)
    except ImportError as fault:  # a package that this task alone needs
        raise BadValue(f"{task} cannot be prepared: {line_of(fault, whole=True)}") from fault
    return HarnessTask(task, data, {**_setting(bos, options), "name": name}, bos_notes(task, bos))


def _setting(bos: Any, options: Options) -> dict[str, Any]:
    return {"bos": None if bos is None else bos.id, "batch_size": options.batch_size or BATCH}


def check_name(task: Task, name: str) -> None:
    """Check that the harness has a task of this name. Raises BadValue, also without lm-eval."""
    _require_harness(task)
    with _quiet():
        known = _manager().all_tasks
    if name not in known:
        advice = nearest(name, [*known, "paper"], "`lm-eval ls tasks` lists all tasks", most=3, cutoff=0.6)
        raise BadValue(f"lm-evaluation-harness has no task {name!r}; {advice}")


def _require_harness(task: Task) -> None:
    try:
        import lm_eval  # noqa: F401 # only to check that it is installed
    except ImportError:
        raise BadValue(f"{task} needs lm-evaluation-harness; install it with pip install 'mwtool[eval]'") from None


def _seed(seed: int) -> None:
    """Seed every random generator that a task may use."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # the harness uses the global generator
    torch.manual_seed(seed)


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _model(loaded: Loaded, options: Options, on_progress: OnProgress | None) -> Model:
    bos = bos_for(loaded, options)
    from mwtool.evaluation.harness_model import Model

    return Model(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness sets a pad token on it
        backend="causal",
        batch_size=options.batch_size or BATCH,
        max_length=options.window or positions(loaded.base.config),
        softmax_dtype="float32",
        prefix_token_id=None if bos is None else bos.id,
        on_progress=on_progress,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log, except for errors, and its progress bar over requests."""
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    before = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(before)
        task.tqdm = bar
