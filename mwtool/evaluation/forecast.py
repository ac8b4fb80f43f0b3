"""What a measurement will run, and the memory and time that takes, told from a short trial: what `--dry-run` shows.

Forwards follow from the windows and states alone. The batch that takes the most memory is run in a few states of the
model: in the process that the measurement itself would be, with the model loaded as it would be. What this process and
the GPU hold at most is therefore measured, and so is the time until here; the time of the other batches goes by tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.measurement import OnProgress
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.workload import Work, work_of
from mwtool.files.document import envelope
from mwtool.files.units import duration, size
from mwtool.models.load import Loaded
from mwtool.models.peak_memory import gpu_peak, peak_of, process_peak
from mwtool.models.weight_files import find_weights

SCHEMA = "mwtool.forecast/1"
TRIED = 3
LONG = 3.0
"""Seconds from which on the first run of a trial is timed: what is made once, such as kernels, hardly shows there."""
"""States of a batch that a trial runs: the first one, and those that change the lowest and the highest layer."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a measurement of one model will run.

    head: the first keys of its document. read: bytes of its weight files; None where they are not known.
    weights, held, batch: bytes of the model in memory, of what is kept beside it, and of what the largest batch takes;
    `batch` is None where no task could be tried. offloaded: bytes of weights that lie elsewhere. process, gpu: bytes
    that this process has been resident with, and a GPU's allocator has held, at most; None where nothing says so.
    forwards: of batches, in all states; None where a task's cannot be known. seconds: of the tasks in `tried`.
    trial: seconds that the trial took, which the measurement will not take.
    states: as `States.said`.
    """

    model: str
    head: dict[str, Any]
    parameters: int
    read: int | None
    weights: int
    offloaded: int
    held: int
    batch: int | None
    process: int | None
    gpu: int | None
    works: tuple[Work, ...]
    states: dict[str, int]
    forwards: int | None
    seconds: float
    trial: float
    tried: tuple[str, ...]

    @property
    def memory(self) -> int:
        """At the peak, in bytes."""
        return self.weights + self.held + (self.batch or 0)

    @property
    def untried(self) -> tuple[str, ...]:
        """Tasks whose forwards, time and memory are not known before they run."""
        return tuple(one.task for one in self.works if one.task not in self.tried)


def forecast(loaded: Loaded, ready: Sequence[Prepared], states: States, options: Options) -> Forecast:
    """Run a short trial. ready: the tasks, prepared. Nothing is kept of it; raises MwtoolError where a state does."""
    start = time.perf_counter()
    works = [work_of(loaded, one, options) for one in ready]
    known = [work for work in works if work.largest is not None]
    tried = [_tried(loaded, work, states, options) for work in known]
    count = 1 + len(states.attacked)
    before = states.passes * sum(work.units or 0 for work in known if work.unit == "windows")
    weights, offloaded = _held_by(loaded)
    return Forecast(
        model=loaded.source.name,
        head=_head(loaded),
        parameters=sum(one.numel() for one in loaded.model.parameters()),
        read=_stored(loaded),
        weights=weights,
        offloaded=offloaded,
        held=states.held,
        batch=max((one.batch for one in tried), default=None),
        process=max((one.process for one in tried if one.process is not None), default=None),
        gpu=max((one.gpu for one in tried if one.gpu is not None), default=None),
        works=tuple(works),
        states=states.said,
        forwards=before + count * sum(len(work.batches) for work in known) if len(known) == len(works) else None,
        seconds=sum(one.seconds for one in tried),
        trial=time.perf_counter() - start,
        tried=tuple(work.task for work in known),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Of a task: seconds in all states, bytes of its largest batch, and of the process and a GPU until then."""

    seconds: float
    batch: int
    process: int | None
    gpu: int | None


def _tried(loaded: Loaded, work: Work, states: States, options: Options) -> _Found:
    """Run the largest batch of a task: as it will be, once more for its time if that is short, and counted."""
    assert work.largest is not None
    marks: list[float] = []

    def on_part(_done: int, _total: int) -> None:
        marks.append(time.perf_counter())

    run = _trial(loaded, work.largest, states, options, on_part)
    start = time.perf_counter()
    run()
    process, gpu = process_peak(), gpu_peak()  # before tensors are counted, which takes memory of its own
    if marks[-1] - start < LONG:
        marks.clear()
        start = time.perf_counter()
        run()
    took = [after - before for before, after in zip([start, *marks], marks, strict=False)]
    if states.reuse and work.unit == "windows":  # the mark of the first state has the trial of what can be reused in it
        start = time.perf_counter()
        work.largest.run(loaded, options)
        took[0] = (time.perf_counter() - start) * (1 + states.passes)
    peak = peak_of(run, {one.device for one in loaded.model.parameters()})
    share = sum(work.batches) / work.batches[0]
    return _Found(share * (took[0] + _of_states(took[1:], states)), peak, process, gpu)


def _trial(
    loaded: Loaded, largest: Prepared, states: States, options: Options, on_part: OnProgress
) -> Callable[[], None]:
    """Runs the batch in the first state and one or two others; on_part: called after each."""
    few = _extremes(states.attacked)

    def until_tried(done: int, total: int) -> None:
        on_part(done, total)
        if done >= min(TRIED, 1 + len(few)):
            raise _Tried

    def reusing() -> None:
        assert isinstance(largest, PerplexityTask)
        every = sorted(states.attacked, key=lambda one: one.layer)
        with suppress(_Tried):  # all are given, since the streams into all layers are kept
            largest.under(loaded, [*few, *every], options, until_tried)

    def one_by_one() -> None:
        for state in (states.first, *few):
            with state.apply():
                largest.run(loaded, options)
            on_part(1, 1)

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


def _held_by(loaded: Loaded) -> tuple[int, int]:
    """Bytes of the model's parameters and buffers in memory, each storage once; and of those that lie elsewhere."""
    here: dict[int, int] = {}
    elsewhere = 0
    model: Any = loaded.model
    for one in chain(model.parameters(), model.buffers()):
        if one.is_meta:
            elsewhere += one.numel() * one.element_size()
        else:
            storage = one.untyped_storage()
            here[storage.data_ptr()] = max(here.get(storage.data_ptr(), 0), one.numel() * one.element_size())
    return sum(here.values()), elsewhere


def _stored(loaded: Loaded) -> int | None:
    source = loaded.source
    if source.gguf is not None:
        return source.gguf.path.stat().st_size
    found = find_weights(source)
    return None if found is None else sum((source.folder / name).stat().st_size for name in found.shards)


def document_of(
    found: Sequence[Forecast], command: str | None = None, *, before: float | None = None
) -> dict[str, Any]:
    """The document of schema mwtool.forecast/1; the first keys are about the first model.

    before: seconds from the start of the process, without the trials: those of loading, and of whatever comes first.
    """
    head = {**found[0].head, "command": command}
    known = before is not None and all(one.tried for one in found)
    total = before + sum(one.seconds for one in found) if known and before is not None else None
    return {**head, "before_seconds": before, "total_seconds": total, "models": [_entry(one) for one in found]}


def _head(loaded: Loaded) -> dict[str, Any]:
    return envelope(
        SCHEMA,
        model=loaded.source.name,
        revision=loaded.source.revision,
        model_type=loaded.base.config.model_type,
        dtype=str(loaded.base.dtype).removeprefix("torch."),
        device=str(loaded.base.device),
    )


def _entry(found: Forecast) -> dict[str, Any]:
    tasks = [
        {
            "task": one.task,
            "unit": one.unit,
            "units": one.units,
            "forwards": one.forwards,
            "tokens": sum(one.batches) or None,
        }
        for one in found.works
    ]
    return {
        "model": found.model,
        "parameters": found.parameters,
        "bytes_read": found.read,
        "tasks": tasks,
        "states": found.states,
        "forwards": found.forwards,
        "memory": {
            "weights": found.weights,
            "held": found.held,
            "batch": found.batch,
            "total": found.memory,
            "offloaded": found.offloaded,
            "process": found.process,
            "gpu": found.gpu,
        },
        "seconds": found.seconds if found.tried else None,
        "untried": list(found.untried),
    }


def lines_of(found: Forecast) -> list[str]:
    """The forecast as lines for people."""
    read = "" if found.read is None else f", {size(found.read)} of weight files"
    lines = [f"model     {found.model}, {found.parameters:,} parameters{read}"]
    for one in found.works:
        units = f"{one.unit}: as many as the harness has" if one.units is None else f"{one.units:,} {one.unit}"
        each = "" if one.forwards is None else f", {one.forwards:,} batches of at most {one.batches[0]:,} tokens"
        lines.append(f"task      {one.task}, {units}{each}")
    lines.append(f"states    {', '.join(f'{count:,} {name}' for name, count in found.states.items())}")
    if found.forwards is not None:
        lines.append(f"forwards  {found.forwards:,}")
    parts = {"weights": found.weights, "kept beside them": found.held, "a batch": found.batch}
    shown = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    lines.append(f"memory    about {size(found.memory)}: {shown}")
    if found.process is not None:
        lines.append(f"process   {size(found.process)} resident at most, with libraries and mapped files, as measured")
    if found.gpu is not None:
        lines.append(f"GPU       {size(found.gpu)} of tensors at most, as its allocator counted")
    if found.offloaded:
        lines.append(f"offloaded {size(found.offloaded)} of weights, which are loaded where they run")
    if found.tried:
        lines.append(f"time      about {duration(found.seconds)}, from a trial of the largest batch")
    if found.untried:
        lines.append(f"not told  time and memory of {', '.join(found.untried)}: known only once they run")
    return lines


class _Tried(Exception):
    """Ends a trial after the states that are tried."""
