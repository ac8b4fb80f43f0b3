"""What a measurement will run, and the memory and time that takes, told from a short trial: what `--dry-run` shows.

Forwards follow from the windows and states alone. The batch that takes the most memory is run in a few states of the
model: in the process that the measurement itself would be, with the model loaded as it would be. What this process and
the GPU hold at most is therefore measured, and so is the time until here; the time of the other batches goes by tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import Prepared
from mwtool.evaluation.trial import States, tried_task
from mwtool.evaluation.workload import Work, work_of
from mwtool.files.document import envelope
from mwtool.files.units import duration, size
from mwtool.models.load import Loaded
from mwtool.models.weight_files import find_weights

SCHEMA = "mwtool.forecast/1"


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
    tried = [tried_task(loaded, work, states, options) for work in known]
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
        each = ""
        if one.forwards is not None:
            batches = f"{one.forwards:,} batches" if one.forwards != 1 else "1 batch"
            each = f", {batches} of at most {one.batches[0]:,} tokens"
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
