"""lm-evaluation-harness, in process, on the loaded model; its tasks, and multiple-choice and cloze files.

bos stands once in front of every context, whatever the tokenizer would do by itself;
log-probabilities are taken in float32; the batch size given is the one that runs.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mwtool.dataset import reaching
from mwtool.errors import BadValue
from mwtool.load import Loaded
from mwtool.measured import BATCH, Measured, OnProgress, Options, bos_for, mean_of, nonfinite, positions, tokenizer_for
from mwtool.perplexity import Perplexity, check_vocabulary, summarize
from mwtool.source import DEMO
from mwtool.tasks import Choice, Cloze, Task, read_choices, read_cloze

if TYPE_CHECKING:
    from mwtool.harness_model import Model

Answer = tuple[float, bool]
"""ln p of a continuation, and whether greedy decoding would give it."""


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
        figures = _cloze_figures(scored) if self.task.kind == "cloze" else _choice_figures(scored)
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
            raise BadValue(f"{self.task}: lm-evaluation-harness gave up: {_line(fault)}") from fault
        assert found is not None, "one process"
        setting = {**self.setting, "shortened": model.shortened}
        return list(_figures(found, str(self.task), time.perf_counter() - start, setting))


def prepare_rows(loaded: Loaded, task: Task, options: Options) -> Rows:
    """Read a file of questions. Raises BadValue for a bad line, a row that does not fit, or without lm-eval."""
    tokenizer_for(loaded, task)
    bos, rows = bos_for(loaded, options), check_rows(task)[: options.limit]
    _check_lengths(loaded, task, rows, options)
    setting = {**_setting(bos, options), "delimiter": options.delimiter}
    notes = (f"{task}: {bos.note}",) if bos is not None and bos.note else ()
    return Rows(task, rows, hashlib.sha256(repr(rows).encode()).hexdigest()[:16], setting, notes)


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
            data = reaching(f"{task}: the dataset of {name}", lambda: _manager().load(name), local)
    except ImportError as fault:  # a package that only this task needs
        raise BadValue(f"{task} cannot be prepared: {_line(fault)}") from fault
    notes = (f"{task}: {bos.note}",) if bos is not None and bos.note else ()
    return Named(task, data, {**_setting(bos, options), "name": name}, notes)


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
        near = difflib.get_close_matches(name, [*known, "paper"], n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists those there are"
        raise BadValue(f"lm-evaluation-harness has no task {name!r}; {advice}")


def _check_lengths(loaded: Loaded, task: Task, rows: Sequence[Choice | Cloze], options: Options) -> None:
    """Each continuation is some tokens of its own, known to the model and no more than it reads; else BadValue."""
    tokenizer, most = loaded.tokenizer, options.window or positions(loaded)
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


def _line(fault: BaseException) -> str:
    return " ".join(str(fault).split()) or type(fault).__name__


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
    from mwtool.harness_model import Model

    return Model(
        pretrained=loaded.model,
        tokenizer=copy.deepcopy(loaded.tokenizer),  # the harness gives it a pad token
        backend="causal",
        batch_size=options.batch_size or BATCH,
        max_length=options.window or positions(loaded),
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


def _choice_figures(scored: Sequence[tuple[Any, list[tuple[float, bool]]]]) -> Iterator[dict[str, Any]]:
    """acc: the likeliest choice is the right one; acc_norm: likeliest for each of its characters."""
    for metric in ("acc", "acc_norm"):
        values = []
        for row, answers in scored:
            scale = [len(ending) if metric == "acc_norm" else 1 for ending in row.endings]
            each = [answer[0] / length for answer, length in zip(answers, scale, strict=True)]
            values.append(float(each.index(max(each)) == row.gold) if all(map(math.isfinite, each)) else math.nan)
        yield mean_of(metric, values)


def _cloze_figures(scored: Sequence[tuple[Any, list[tuple[float, bool]]]]) -> Iterator[dict[str, Any]]:
    yield mean_of("acc", [float(answers[0][1]) if math.isfinite(answers[0][0]) else math.nan for _, answers in scored])
    found = summarize([-answers[0][0] for _, answers in scored], [1] * len(scored), 0.0)
    yield {**_perplexity_figure("perplexity", found), "higher_is_better": False}


def _figures(found: Any, task: str, seconds: float, setting: dict[str, Any]) -> Iterator[Measured]:
    """The harness's results as ours, of each task and of groups; standard errors from its log of samples."""
    for name, results in {**found["results"], **found.get("groups", {})}.items():
        rows = found.get("samples", {}).get(name, [])
        better = found.get("higher_is_better", {}).get(name, {})
        more = {"version": found.get("versions", {}).get(name), "shots": found.get("n-shot", {}).get(name)}
        for key, value in results.items():
            metric, _, selected = key.partition(",")
            if not selected or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            chosen = [row for row in rows if row.get("filter", "none") == selected]
            yield Measured(
                task=task,
                part=None if name == setting["name"] else name,
                seconds=seconds,
                setting={**setting, **more},
                digest=_digest(chosen),
                higher_is_better=better.get(metric) is not False,
                **_figure(metric if selected == "none" else f"{metric}/{selected}", float(value), chosen, metric),
            )


def _digest(rows: Sequence[dict[str, Any]]) -> str | None:
    """The same for the same questions, asked in the same words."""
    text = "".join(row["doc_hash"] + row["prompt_hash"] for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if rows else None


def _figure(name: str, value: float, rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """With samples where the value is their mean, or a perplexity of ln p or (ln p, count) pairs; else without."""
    each = [row[metric] for row in rows if metric in row]
    broken = [at for at, row in enumerate(rows) if not _finite(row.get("filtered_resps"))]
    if broken:  # an argmax over NaN is some choice, and its accuracy some number
        why = nonfinite(broken, len(rows))
        return {"metric": name, "value": math.nan, "stderr": None, "n": len(rows), "nonfinite": why}
    single = bool(each) and all(isinstance(one, (int, float)) for one in each)
    if single:
        figure = mean_of(name, list(map(float, each)))
        figure.pop("higher_is_better")
        if math.isclose(figure["value"], value, rel_tol=1e-6, abs_tol=1e-9):
            return figure
    if each and metric.endswith("perplexity") and (single or all(isinstance(one, (tuple, list)) for one in each)):
        pairs = [(one, 1) if single else one for one in each]
        found = summarize([-float(one[0]) for one in pairs], [int(one[1]) for one in pairs], 0.0)
        if math.isclose(found.value, value, rel_tol=1e-6):
            return _perplexity_figure(name, found)
    bad = None if math.isfinite(value) else f"the harness gave {value}"
    return {"metric": name, "value": value, "stderr": None, "n": len(rows), "nonfinite": bad}


def _perplexity_figure(name: str, found: Perplexity) -> dict[str, Any]:
    return {
        "metric": name,
        "value": found.value,
        "stderr": found.stderr,
        "n": len(found.nll),
        "samples": found.nll,
        "weights": tuple(map(float, found.counts)),
        "nonfinite": found.nonfinite,
    }


def _finite(answers: Any) -> bool:
    """Whether no number among these, at any depth, is NaN or infinite."""
    if isinstance(answers, float):
        return math.isfinite(answers)
    return not isinstance(answers, (list, tuple)) or all(map(_finite, answers))


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
