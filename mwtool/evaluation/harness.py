"""lm-evaluation-harness on the loaded model: its own tasks, and multiple-choice and cloze files.

Every context begins with bos exactly once, whatever the tokenizer does by default;
log-probabilities are computed in float32; the batch size is the one given.
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
from mwtool.evaluation.harness_results import Answer, choice_metrics, cloze_metrics, harness_metrics
from mwtool.evaluation.measurement import BATCH, Measured, OnProgress, bos_for, bos_notes, digest_of, tokenizer_for
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.evaluation.tasks import Choice, Cloze, Task, read_choices, read_cloze
from mwtool.evaluation.windows import positions
from mwtool.files.hub_dataset import load_from_hub
from mwtool.models.load import Loaded
from mwtool.models.source import DEMO

if TYPE_CHECKING:
    from mwtool.evaluation.harness_model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of a local file, ready to run."""

    task: Task
    questions: tuple[Choice | Cloze, ...]
    digest: str
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Accuracy of the likeliest choice; of a cloze file, that of the greedy continuation and the perplexity."""
        from lm_eval.api.instance import Instance

        start = time.perf_counter()
        pairs = [_pairs(question, options.delimiter) for question in self.questions]
        flat = [pair for several in pairs for pair in several]
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(flat)]
        with _quiet():
            model = _model(loaded, options, on_progress)
            answers: Iterator[Answer] = iter(model.loglikelihood(requests))
        scored = [(one, [next(answers) for _ in several]) for one, several in zip(self.questions, pairs, strict=True)]
        metrics = cloze_metrics(scored) if self.task.kind == "cloze" else choice_metrics(scored)
        shared: dict[str, Any] = {"task": str(self.task), "digest": self.digest}
        shared |= {"seconds": time.perf_counter() - start, "setting": {**self.setting, "shortened": model.shortened}}
        return [Measured(**shared, **one) for one in metrics]


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


def prepare_questions(loaded: Loaded, task: Task, options: Options) -> Questions:
    """Read a file of questions. Raises BadValue for a bad line, a question that is too long, or without lm-eval."""
    tokenizer_for(loaded, task)
    bos, questions = bos_for(loaded, options), read_questions(task)[: options.limit]
    _check_lengths(loaded, task, questions, options)
    setting = {**_setting(bos, options), "delimiter": options.delimiter}
    return Questions(
        task=task, questions=questions, digest=digest_of(repr(questions)), setting=setting, notes=bos_notes(task, bos)
    )


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


def read_questions(task: Task) -> tuple[Choice | Cloze, ...]:
    """Read a local file, or the bundled one for `demo`. Raises BadValue for a bad line, or without lm-eval."""
    _require_harness(task)
    path = DEMO / f"{task.kind}.jsonl" if task.target == "demo" else Path(task.target)
    return read_cloze(path) if task.kind == "cloze" else read_choices(path)


def check_name(task: Task, name: str) -> None:
    """Check that the harness has a task of this name. Raises BadValue, also without lm-eval."""
    _require_harness(task)
    with _quiet():
        known = _manager().all_tasks
    if name not in known:
        advice = nearest(name, [*known, "paper"], "`lm-eval ls tasks` lists all tasks", most=3, cutoff=0.6)
        raise BadValue(f"lm-evaluation-harness has no task {name!r}; {advice}")


def _check_lengths(loaded: Loaded, task: Task, questions: Sequence[Choice | Cloze], options: Options) -> None:
    """Raises BadValue if a continuation has no tokens of its own, unknown tokens, or more tokens than the window."""
    tokenizer, most = loaded.tokenizer, options.window or positions(loaded.base.config)
    assert tokenizer is not None, "checked by tokenizer_for"
    for number, question in enumerate(questions, start=1):
        pairs = _pairs(question, options.delimiter)
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
                f"{task}, question {number}: a continuation has {length} tokens; "
                f"expected at least 1{'' if most is None else f' and at most the {most} of the window'}"
            )


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


def _pairs(question: Choice | Cloze, delimiter: str) -> list[tuple[str, str]]:
    """Pairs of context and continuation. Only the trailing whitespace of the delimiter is scored."""
    stated = delimiter.rstrip()
    gap = delimiter[len(stated) :]
    if isinstance(question, Cloze):
        return [(question.context + stated, gap + question.continuation)]
    both = zip(question.contexts, question.endings, strict=True)
    return [(context + stated, gap + ending) for context, ending in both]


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
