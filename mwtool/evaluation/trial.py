"""A short trial of a measurement: the batch of a task that takes the most memory, in a few states of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.workload import Work
from mwtool.models.load import Loaded
from mwtool.models.peak_memory import gpu_peak, peak_of, process_peak

TRIED = 3
"""States of a batch that a trial runs: the first one, and those that change the lowest and the highest layer."""
LONG = 3.0
"""Seconds from which on the first run of a trial is timed: what is made once, such as kernels, hardly shows there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The states of the model that every task is measured in.

    attacked: all but the first, which is the model as it is unless `first` changes it. reuse: whether a perplexity
    runs only the layers that a state can change. passes: how often the texts are read before, for mean values.
    held: bytes kept beside the model throughout. said: how many there are of what, for people and documents.
    """

    attacked: Sequence[Variant]
    first: Variant
    reuse: bool = False
    passes: int = 0
    held: int = 0
    said: dict[str, int]


@dataclass(frozen=True, slots=True)
class Tried:
    """Of a task: seconds in all states, bytes of its largest batch, and of the process and a GPU until then."""

    seconds: float
    batch: int
    process: int | None
    gpu: int | None


def tried_task(loaded: Loaded, work: Work, states: States, options: Options) -> Tried:
    """Run the largest batch of a task: as it will be, once more for its time if that is short, and counted."""
    assert work.largest is not None
    parts: list[Part] = []
    run = _trial(loaded, work.largest, states, options, parts)
    run()
    process, gpu = process_peak(), gpu_peak()  # before tensors are counted, which takes memory of its own
    if sum(one.run + one.change for one in parts) < LONG:
        parts.clear()
        run()
    timed = tuple(parts)
    if states.reuse and work.unit == "windows":  # the first state's time has the trial of what can be reused in it
        start = time.perf_counter()
        work.largest.run(loaded, options)
        timed = (Part((time.perf_counter() - start) * (1 + states.passes)), *timed[1:])
    peak = peak_of(run, {one.device for one in loaded.model.parameters()})
    return Tried(seconds_of(timed, states, sum(work.batches) / work.batches[0]), peak, process, gpu)


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of one state in a trial: of running the batch, and of changing the model and putting it back."""

    run: float
    change: float = 0.0


def seconds_of(parts: Sequence[Part], states: States, batches: float) -> float:
    """Of all batches in all states. parts: of the states tried, the first one first; batches: how many like the one."""
    runs = parts[0].run + _of_states([one.run for one in parts[1:]], states)
    return batches * runs + parts[0].change + _of_states([one.change for one in parts[1:]], states)


def _trial(
    loaded: Loaded, largest: Prepared, states: States, options: Options, parts: list[Part]
) -> Callable[[], None]:
    """Runs the batch in the first state and one or two others; parts: where what each took is added."""
    few, last = _extremes(states.attacked), time.perf_counter()

    def until_tried(done: int, _total: int) -> None:
        nonlocal last
        parts.append(Part(time.perf_counter() - last))
        last = time.perf_counter()
        if done >= min(TRIED, 1 + len(few)):
            raise _Tried

    def reusing() -> None:
        nonlocal last
        assert isinstance(largest, PerplexityTask)
        last = time.perf_counter()
        every = sorted(states.attacked, key=lambda one: one.layer)
        with suppress(_Tried):  # all are given, since the streams into all layers are kept
            largest.under(loaded, [*few, *every], options, until_tried)

    def one_by_one() -> None:
        for state in (states.first, *few):
            start = time.perf_counter()
            with state.apply():
                begun = time.perf_counter()
                largest.run(loaded, options)
                ran = time.perf_counter() - begun
            parts.append(Part(ran, time.perf_counter() - start - ran))

    return reusing if states.reuse and isinstance(largest, PerplexityTask) else one_by_one


def _extremes(attacked: Sequence[Variant]) -> list[Variant]:
    """Those that change the lowest and the highest layer."""
    return [min(attacked, key=lambda one: one.layer), max(attacked, key=lambda one: one.layer)] if attacked else []


def _of_states(took: Sequence[float], states: States) -> float:
    """Seconds of a batch in all attacked states: between the lowest and the highest layer it goes by the layer."""
    if not states.attacked:
        return 0.0
    low, high = (one.layer for one in _extremes(states.attacked))
    slope = (took[1] - took[0]) / (high - low) if high > low else 0.0
    level = took[0] if high > low else sum(took) / len(took)
    return sum(max(0.0, level + slope * (one.layer - low)) for one in states.attacked)


class _Tried(Exception):
    """Ends a trial after the states that are tried."""
