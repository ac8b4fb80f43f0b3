"""The mean accuracy over zero-shot tasks, each with the same weight, as the paper's tables have it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mwtool.evaluation.comparison import Entry, Paired, is_accuracy, paired
from mwtool.evaluation.measurement import Measured
from mwtool.files.document import finite

LEAST = 2
"""Fewest tasks of which a mean is given."""


@dataclass(frozen=True, slots=True)
class TaskMean:
    """The mean of one accuracy metric over tasks. measured: that metric of each task."""

    metric: str
    measured: tuple[Measured, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, as they were typed."""
        return tuple(one.task for one in self.measured)

    @property
    def value(self) -> float:
        """The mean of the tasks' accuracies a_t, from 0 to 1."""
        return statistics.fmean(one.value for one in self.measured)

    @property
    def stderr(self) -> float | None:
        """sqrt(sum of SE_t^2) / T: the questions of different tasks are drawn apart. None where a task has no SE_t."""
        errors = [one.stderr for one in self.measured]
        known = [one for one in errors if one is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None

    def beside(self, other: TaskMean) -> Paired | None:
        """The difference in points, paired by questions: the mean of the tasks' differences, +- sqrt(sum h_t^2) / T.

        h_t is half the 95 % interval of task t's difference. None where tasks or questions differ.
        """
        if (self.metric, self.tasks) != (other.metric, other.tasks):
            return None
        found = [paired(one, beside) for one, beside in zip(self.measured, other.measured, strict=True)]
        known = [one for one in found if one is not None and one.kind == "points"]
        if len(known) < len(found):
            return None
        value, n = statistics.fmean(one.value for one in known), sum(one.n for one in known)
        halves = [(one.high - one.low) / 2 for one in known if one.low is not None and one.high is not None]
        if len(halves) < len(known):
            return Paired(kind="points", value=value, low=None, high=None, n=n)
        half = math.hypot(*halves) / len(halves)
        return Paired(kind="points", value=value, low=value - half, high=value + half, n=n)


def task_means(measured: Sequence[Measured]) -> tuple[TaskMean, ...]:
    """The means over all tasks that have accuracies, of each metric that all of them have; none of a single task.

    Subtasks of a group are in the group's own figure and enter no mean, nor does what is not finite.
    """
    accuracies = [one for one in measured if one.part is None and is_accuracy(one) and not one.nonfinite]
    tasks = dict.fromkeys(one.task for one in accuracies)
    found = []
    for metric in dict.fromkeys(one.metric for one in accuracies):
        own = tuple(one for one in accuracies if one.metric == metric)
        if len(own) == len(tasks) >= LEAST:
            found.append(TaskMean(metric, own))
    return tuple(found)


def mean_document(mean: TaskMean, reference: TaskMean | None) -> dict[str, Any]:
    """The keys of a mean. reference: what it is compared with; None where it is the first itself."""
    change = None if reference is None else mean.beside(reference)
    ends = (None, None) if change is None else (change.low, change.high)
    return {
        "metric": mean.metric,
        "tasks": list(mean.tasks),
        "value": mean.value,
        "stderr": None if mean.stderr is None else finite(mean.stderr),
        "points": None if change is None else change.value,
        "points_interval": None if None in ends else list(ends),
    }


def compared_means(entries: Sequence[Entry]) -> list[tuple[str, str, TaskMean, TaskMean | None]]:
    """Model, attack, mean, and the first mean of the same metric, None for that one itself; in the order of entries."""
    first: dict[str, TaskMean] = {}
    found = []
    for (model, attack, _), own in _apart(entries).items():
        for mean in task_means(list(own.values())):
            reference = first.setdefault(mean.metric, mean)
            found.append((model, attack, mean, None if reference is mean else reference))
    return found


def _apart(entries: Sequence[Entry]) -> dict[tuple[str, str, int], dict[Any, Measured]]:
    """The metrics by model and attack; by a number too, as two files may be called the same."""
    groups: dict[tuple[str, str, int], dict[Any, Measured]] = {}
    for entry in entries:
        number = 0
        while entry.key in groups.get((entry.model, entry.attack, number), {}):
            number += 1
        groups.setdefault((entry.model, entry.attack, number), {})[entry.key] = entry.measured
    return groups
