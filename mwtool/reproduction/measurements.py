"""What the documents in the folder of a study hold, by column, attack and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mwtool.evaluation.document import measured_of
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.tasks import parse_task, parse_tasks
from mwtool.files.text import read_json
from mwtool.models.load_options import On
from mwtool.reproduction.commands import SWEEPS, folder_of
from mwtool.reproduction.config import StudyConfig
from mwtool.reproduction.controls import control_cell
from mwtool.reproduction.runs import Kind, Run
from mwtool.reproduction.statistics import BySeed
from mwtool.reproduction.steps import evaluations

MEAN = "zero-shot mean"
"""The column of the mean over all zero-shot tasks."""
PLAIN_ACCURACY = ("boolq", "winogrande")
"""Tasks whose accuracy is not by characters, as lm-evaluation-harness has it."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is compared by column: one run, or the model itself (None), under one attack."""

    run: Run | None
    attack: str
    on: On = "base"


@dataclass(slots=True)
class Measurements:
    """Reads the documents when they are asked for; a new one sees what was measured since."""

    config: StudyConfig
    seeds: int
    _read: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)
    measured_with: Counter[str] = field(default_factory=Counter)
    """Versions and device -> how many of the documents that were read were measured with them."""

    @property
    def columns(self) -> list[str]:
        """Names of texts, then of tasks, then the mean of these where there are several."""
        return [*self.config.measuring.texts, *self._tasks, *([MEAN] if len(self._tasks) > 1 else [])]

    @property
    def _tasks(self) -> dict[str, str]:
        """Name of a column -> the task, of zero-shot tasks: that of the file, unless another column has it."""
        tasks = list(map(str, parse_tasks(self.config.measuring.tasks)))
        names = [Path(parse_task(task).target).stem for task in tasks]
        taken = [*self.config.measuring.texts, *names]
        return {task if taken.count(name) > 1 else name: task for name, task in zip(names, tasks, strict=True)}

    def task(self, column: str) -> str | None:
        """The task of a column; None for the mean."""
        text = self.config.measuring.texts.get(column)
        return f"ppl:{text}" if text is not None else self._tasks.get(column)

    def by_seed(self, key: Key, column: str) -> BySeed:
        """The measurements of a column for every seed that was trained and measured."""
        runs: list[Run | None] = [None]
        if key.run is not None:
            runs = [replace(key.run, seed=seed) for seed in range(self.seeds)]
        found = {}
        for run in runs:
            several = tuple(self._of_run(run, key, column))
            if several:
                found[0 if run is None else run.seed] = several
        return found

    def _of_run(self, run: Run | None, key: Key, column: str) -> Iterator[Measured]:
        """The measurement of a column, or of all tasks for the mean; nothing unless all are there."""
        names = list(self._tasks) if column == MEAN else [column]
        kind: Kind = "texts" if column in self.config.measuring.texts else "tasks"
        path = folder_of(self.config, run) / f"{key.on}.{kind}.json"
        if path not in self._read:
            documents = evaluations(path)
            self._read[path] = [result for document in documents for result in document["results"]]
            self.measured_with.update(measured_with(document) for document in documents)
        found = [self._chosen(self._read[path], key.attack, name) for name in names]
        yield from (one for one in found if one is not None and None not in found)

    def control(self, attack: str, column: str) -> dict[str, Any] | None:
        """The cell of random rows under an attack."""
        kind: Kind = "texts" if column in self.config.measuring.texts else "tasks"
        path = self.config.folder / SWEEPS[kind]
        if not path.exists():
            return None
        document = dict(read_json(path))
        wanted = list(self._tasks) if column == MEAN else [column]
        names = [_named(document["tasks"], self.task(one), one) for one in wanted]
        return control_cell(document, attack, [name for name in names if name is not None])

    def _chosen(self, entries: list[dict[str, Any]], attack: str, column: str) -> Measured | None:
        """The metric that stands for a task: perplexity, accuracy by characters, or plain accuracy."""
        own = [
            entry
            for entry in entries
            if (entry["attack"], entry["task"], entry["part"]) == (attack, self.task(column), None)
        ]
        by_metric = {entry["metric"]: entry for entry in own}
        return None if not by_metric else measured_of(by_metric[_metric(list(by_metric), column)])

    def described(self, column: str) -> dict[str, Any]:
        """The `columns` entry of a column, as far as something was measured."""
        first = next((one for one in self._any(column)), None)
        perplexity = column in self.config.measuring.texts
        return {
            "name": column,
            "task": self.task(column),
            "metric": first.metric if first and column != MEAN else "perplexity" if perplexity else "accuracy",
            "higher_is_better": not perplexity,
            "n": None if first is None or column == MEAN else first.n,
        }

    def _any(self, column: str) -> Iterator[Measured]:
        kind = "texts" if column in self.config.measuring.texts else "tasks"
        names = list(self._tasks) if column == MEAN else [column]
        for entries in self._read_of(kind):
            for attack in dict.fromkeys(entry["attack"] for entry in entries):
                one = self._chosen(entries, attack, names[0])
                if one is not None:
                    yield one

    def _read_of(self, kind: str) -> list[list[dict[str, Any]]]:
        return [entries for path, entries in self._read.items() if path.name.endswith(f"{kind}.json")]


def measured_with(document: Mapping[str, Any]) -> str:
    """The versions and the device of a document, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"mwtool {document['mwtool_version']}, {versions}, on {document['device']}"


def _metric(found: list[str], column: str) -> str:
    """The metric that stands for a task."""
    order = ("acc", "acc_norm") if column in PLAIN_ACCURACY else ("acc_norm", "acc")
    return next((one for one in order if one in found), found[0])


def _named(tasks: list[dict[str, Any]], task: str | None, column: str) -> str | None:
    """What an ablation calls the metric that stands for a task."""
    own = {one["metric"]: one["name"] for one in tasks if one["task"] == task}
    return own[_metric(list(own), column)] if own else None
