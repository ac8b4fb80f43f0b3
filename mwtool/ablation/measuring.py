"""Measure all tasks under all attacks of a sweep, leaving out what was measured before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from mwtool.ablation.means import Means, edits_of
from mwtool.ablation.plans import Key, Plan
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.measurement import Measured, OnProgress
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.models.load import Loaded
from mwtool.surgery.attack import Attack, edited_together

EVERY = 15.0
"""Seconds between two savings in the course of a perplexity, which all attacks share; other tasks save after each."""

OnRun = Callable[[int, int, str], OnProgress | None]
"""Called before each run with the runs done, their total, and its name; may return a progress callback."""
Metrics = Mapping[str, tuple[Measured, ...]]
"""Task -> its metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A perplexity of which some windows are measured.

    under: the attacks, in order; None is the unchanged model. sums: of each, the summed -ln p of each window so far,
    in the order in which windows are run.
    """

    task: str
    under: tuple[Key | None, ...]
    sums: tuple[tuple[float, ...], ...]


@dataclass(slots=True, kw_only=True)
class Measurements:
    """What has been measured: of the unchanged model (None) and under each attack, by task; and what was begun."""

    found: dict[Key | None, dict[str, tuple[Measured, ...]]] = field(default_factory=dict)
    part: Part | None = None

    def of(self, key: Key | None) -> Metrics:
        """The metrics by task; of the unchanged model for an attack that was not measured by itself."""
        return self.found.get(key, self.found.get(None, {}))


@dataclass(slots=True, kw_only=True)
class Measuring:
    """All tasks on the unchanged model and under every plan: perplexities batch by batch, other tasks plan by plan.

    measurements: those made before, to which new ones are added. on_saved: called after each addition.
    """

    loaded: Loaded
    plans: Sequence[Plan]
    means: Means
    tasks: Sequence[Prepared]
    options: Options
    measurements: Measurements
    on_run: OnRun | None = None
    on_saved: Callable[[], None] | None = None
    done: int = 0
    saved: float = 0.0

    def run(self) -> None:
        """Measure what is not there yet. Raises MwtoolError."""
        self.saved = time.monotonic()
        others = [one for one in self.tasks if not isinstance(one, PerplexityTask)]
        for one in self.tasks:
            if isinstance(one, PerplexityTask):
                self._batchwise(one)
        for plan in (None, *self.plans) if others else ():
            key = None if plan is None else plan.same
            left = [one for one in others if not self._has(key, one)]
            self.done += len(others) - len(left)
            if left:
                with self.applied(plan):
                    for one in left:
                        name = f"{'baseline' if plan is None else plan.name}, {one.task}"
                        self._add(key, one, one.run(self.loaded, self.options, self._next(name)))
                        self._save()

    def applied(self, plan: Plan | None) -> AbstractContextManager[None]:
        """The model under this plan."""
        if plan is None:
            return edited_together(self.loaded.base, (), Attack())
        return edited_together(self.loaded.base, edits_of(plan.targets, plan.rows, self.means), plan.attack)

    def complete(self) -> list[Prepared]:
        """The tasks that have been measured under everything."""
        keys = [None, *(plan.same for plan in self.plans)]
        return [one for one in self.tasks if all(self._has(key, one) for key in keys)]

    def _batchwise(self, task: PerplexityTask) -> None:
        plans = [plan for plan in self.plans if not self._has(plan.same, task)]
        if not plans and self._has(None, task):
            self.done += 1
            return
        under = (None, *(plan.same for plan in plans))
        variants = [Variant(min(one.layer for one in plan.targets), partial(self.applied, plan)) for plan in plans]
        part = self.measurements.part
        earlier = part.sums if part is not None and (part.task, part.under) == (str(task.task), under) else ()

        def on_part(sums: Sequence[Sequence[float]]) -> None:
            if time.monotonic() - self.saved >= EVERY:
                kept = tuple(map(tuple, sums))
                self.measurements.part = Part(task=str(task.task), under=under, sums=kept)
                self._save()

        on_progress = self._next(f"{task.task} under all attacks")
        found = task.under(
            self.loaded,
            variants,
            self.options,
            on_progress,
            earlier=earlier,
            on_part=None if self.on_saved is None else on_part,
        )
        for key, one in zip(under, found, strict=True):
            self._add(key, task, [one])
        self.measurements.part = None
        self._save()

    def _has(self, key: Key | None, task: Prepared) -> bool:
        return str(task.task) in self.measurements.found.get(key, {})

    def _add(self, key: Key | None, task: Prepared, found: Sequence[Measured]) -> None:
        self.measurements.found.setdefault(key, {})[str(task.task)] = tuple(found)

    def _save(self) -> None:
        if self.on_saved is not None:
            self.on_saved()
        self.saved = time.monotonic()

    def _next(self, name: str) -> OnProgress | None:
        """Called before each part of the work: a perplexity under all attacks, or another task under one."""
        apart = sum(isinstance(one, PerplexityTask) for one in self.tasks)
        total = apart + (len(self.tasks) - apart) * (1 + len(self.plans))
        self.done += 1
        return None if self.on_run is None else self.on_run(self.done - 1, total, name)
