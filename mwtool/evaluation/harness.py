"""lm-evaluation-harness, in process, on the loaded model; its tasks, and multiple-choice and cloze files.

bos stands once in front of every context, whatever the tokenizer would do by itself;
log-probabilities are taken in float32; the batch size given is the one that runs.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mwtool.errors import BadValue, line_of, nearest
from mwtool.evaluation.config import Options
from mwtool.evaluation.harness_results import Answer, choice_figures, cloze_figures, harness_figures
from mwtool.evaluation.measurement import BATCH, Measured, OnProgress, bos_for, bos_notes, digest_of, tokenizer_for
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.evaluation.tasks import Choice, Cloze, Task, read_choices, read_cloze
from mwtool.evaluation.windows import positions
from mwtool.files.hub_dataset import load_from_hub
from mwtool.models.load import Loaded
from mwtool.models.source import DEMO

if TYPE_CHECKING:
    from mwtool.evaluation.harness_model import Model


@dataclass(frozen=True, slots=True)
class Rows:
    """A local file's rows, ready to be asked."""

    task: Task
    rows: tuple[Choice | Cloze, ...]
    digest: str
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Accuracy of the likeliest choice, or of the greedy continuation with the perplexity of the true one."""
        from lm_eval.api.instance import Instance

        start = time.perf_counter()
        pairs = [_pairs(row, options.delimiter) for row in self.rows]
        flat = [pair for several in pairs for pair in several]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(flat)]
        with _quiet():
            model = _model(loaded, options, on_progress)
            answers: Iterator[Answer] = iter(model.loglikelihood(requests))
        scored = [(row, [next(answers) for _ in several]) for row, several in zip(self.rows, pairs, strict=True)]
        figures = cloze_figures(scored) if self.task.kind == "cloze" else choice_figures(scored)
        shared: dict[str, Any] = {"task": str(self.task), "digest": self.digest}
        shared |= {"seconds": time.perf_counter() - start, "setting": {**self.setting, "shortened": model.shortened}}
        return [Measured(**shared, **one) for one in figures]


@dataclass(frozen=True, slots=True)
class Named:
    """A task, group or tag of the harness, by name."""

    task: Task
    loaded: dict[str, Any]
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Every metric of every task of that name, and of the group. Raises BadValue where the harness gives up."""
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
            raise BadValue(f"{self.task}: lm-evaluation-harness gave up: {line_of(fault, whole=True)}") from fault
        assert found is not None, "one process"
        setting = {**self.setting, "shortened": model.shortened}
        return list(harness_figures(found, str(self.task), time.perf_counter() - start, setting))


def prepare_rows(loaded: Loaded, task: Task, options: Options) -> Rows:
    """Read a file of questions. Raises BadValue for a bad line, a row that does not fit, or without lm-eval."""
    tokenizer_for(loaded, task)
    bos, rows = bos_for(loaded, options), check_rows(task)[: options.limit]
    _check_lengths(loaded, task, rows, options)
    setting = {**_setting(bos, options), "delimiter": options.delimiter}
    return Rows(task, rows, digest_of(repr(rows)), setting, bos_notes(task, bos))


def prepare_named(loaded: Loaded, task: Task, options: Options, name: str | None = None) -> Named:
    """Find a task and fetch its data; name: what the harness calls it, where that is not the task's own name.

    Raises BadValue with the names that are near, ModelNotFound without data.
    """
    tokenizer_for(loaded, task)
    bos, name = bos_for(loaded, options), name or task.target
    check_name(task, name)
    local = "mc:FILE.jsonl and cloze:FILE.jsonl measure local ones"
    try:
        with _quiet():
            data = load_from_hub(f"{task}: the dataset of {name}", lambda: _manager().load(name), local)
    except ImportError as fault:  # a package that only this task needs
        raise BadValue(f"{task} cannot be prepared: {line_of(fault, whole=True)}") from fault
    return Named(task, data, {**_setting(bos, options), "name": name}, bos_notes(task, bos))


def _setting(bos: Any, options: Options) -> dict[str, Any]:
    return {"bos": None if bos is None else bos.id, "batch_size": options.batch_size or BATCH}


def check_rows(task: Task) -> tuple[Choice | Cloze, ...]:
    """The rows of a local file; `demo` is the bundled one. Raises BadValue for a bad line, or without lm-eval."""
    _needed(task)
    path = DEMO / f"{task.kind}.jsonl" if task.target == "demo" else Path(task.target)
    return read_cloze(path) if task.kind == "cloze" else read_choices(path)


def check_name(task: Task, name: str) -> None:
    """Whether the harness knows this name. Raises BadValue with the names that are near, or without lm-eval."""
    _needed(task)
    with _quiet():
        known = _manager().all_tasks
    if name not in known:
        advice = nearest(name, [*known, "paper"], "`lm-eval ls tasks` lists all tasks", most=3, cutoff=0.6)
        raise BadValue(f"lm-evaluation-harness has no task {name!r}; {advice}")


def _check_lengths(loaded: Loaded, task: Task, rows: Sequence[Choice | Cloze], options: Options) -> None:
    """Each continuation is some tokens of its own, known to the model and no more than it reads; else BadValue."""
    tokenizer, most = loaded.tokenizer, options.window or positions(loaded.base.config)
    assert tokenizer is not None, "seen before"
    for number, row in enumerate(rows, start=1):
        pairs = _pairs(row, options.delimiter)
        wholes = [context + continuation for context, continuation in pairs]
        ids = tokenizer(wholes, add_special_tokens=False, verbose=False)["input_ids"]
        check_vocabulary(loaded.model, [torch.tensor(one) for one in ids])
        lengths = [
            len(whole) - len(part)
            for whole, part in zip(
                ids,
                tokenizer([one.rstrip() for one, _ in pairs], add_special_tokens=False, verbose=False)["input_ids"],
                strict=True,
            )
        ]
        if min(lengths) < 1 or (most is not None and max(lengths) > most):
            length = min(lengths) if min(lengths) < 1 else max(lengths)
            raise BadValue(
                f"{task}, row {number}: a continuation has {length} tokens; "
                f"expected at least 1{'' if most is None else f' and at most the {most} of the window'}"
            )


def _needed(task: Task) -> None:
    try:
        import lm_eval  # noqa: F401 # only to see that it is there
    except ImportError:
        raise BadValue(f"{task} needs lm-evaluation-harness; install it with pip install 'mwtool[eval]'") from None


def _seed(seed: int) -> None:
    """All generators a task may draw from."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 # the harness's tasks draw from this one
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
        tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness gives it a pad token
        backend="causal",
        batch_size=options.batch_size or BATCH,
        max_length=options.window or positions(loaded.base.config),
        softmax_dtype="float32",
        prefix_token_id=None if bos is None else bos.id,
        on_progress=on_progress,
    )


def _pairs(row: Choice | Cloze, delimiter: str) -> list[tuple[str, str]]:
    """What to ask: context and continuation. Of the delimiter only its final whitespace is scored."""
    stated = delimiter.rstrip()
    gap = delimiter[len(stated) :]
    if isinstance(row, Cloze):
        return [(row.context + stated, gap + row.continuation)]
    return [(context + stated, gap + ending) for context, ending in zip(row.contexts, row.endings, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log of what it is doing, and its bar over questions made; its errors remain."""
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
