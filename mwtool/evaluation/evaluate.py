"""Evaluate one loaded model on every task, without and with each attack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mwtool.errors import BadValue
from mwtool.evaluation.compiled import Compilation, compile_lines
from mwtool.evaluation.config import Options
from mwtool.evaluation.corpora import default_protocol, text_for
from mwtool.evaluation.measurement import Measured, OnProgress, bos_for, perplexity_of, tokenizer_for
from mwtool.evaluation.perplexity import Perplexity, perplexity
from mwtool.evaluation.prefix_reuse import Variant, perplexities
from mwtool.evaluation.tasks import KINDS, Task
from mwtool.evaluation.windows import Windows, protocol_named, window_for, windows
from mwtool.massive import MassiveWeights
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, Edit, edited, edited_together, rows_of

if TYPE_CHECKING:
    from torch import nn

OnTask = Callable[[int, int, str], OnProgress | None]
"""Called before each task with the tasks done, their total, and its name; may return a progress callback."""


class Prepared(Protocol):
    """A task that is ready to run: its data is read and tokenized, once for all attacks."""

    @property
    def task(self) -> Task:
        """The task."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the task is measured."""
        ...

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Measure the model in its current state: one entry for each metric. Raises MwtoolError."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """A metric measured under an attack."""

    attack: Attack
    measured: Measured


def evaluate(
    loaded: Loaded,
    massive: MassiveWeights | None,
    attacks: Sequence[Attack],
    tasks: Sequence[Task],
    options: Options | None = None,
    *,
    on_results: Callable[[Sequence[Result]], None] | None = None,
    on_task: OnTask | None = None,
    on_note: Callable[[str], None] | None = None,
    done: Collection[tuple[str, str]] = (),
    groups: Mapping[tuple[int, ...], Group] | None = None,
) -> tuple[Result, ...]:
    """Measure every task under every attack on one loaded model.

    on_results: called with the metrics of each task when it ends. on_task: see `OnTask`. on_note: called with every
    decision made on the user's behalf. done: pairs of attack and task, as text, to leave out.
    groups: rows of the layers that an attack names; under (), rows for attacks that name none, instead of `massive`.
    Raises BadValue, before anything runs, if an attack needs massive weights and the model has none.
    """
    options = options or Options()
    left = [(attack, task) for attack in attacks for task in tasks if (str(attack), str(task)) not in done]
    wanted = dict.fromkeys(attack for attack, _ in left)
    for attack in wanted:
        with attacking(loaded, massive, attack, groups or {}):  # raises now, not after hours of measuring
            pass
    needed = dict.fromkeys(task for _, task in left)
    ready = dict(zip(needed, prepare(loaded, list(needed), options), strict=True))
    for line in dict.fromkeys(line for one in ready.values() for line in one.notes):
        if on_note is not None:
            on_note(line)
    results: list[Result] = []
    said: set[str] = set()
    over = 0
    for attack in wanted:
        with attacking(loaded, massive, attack, groups or {}):
            for task in (task for other, task in left if other == attack):
                on_progress = None if on_task is None else on_task(over, len(left), f"{attack}, {task}")
                over += 1
                found = [Result(attack, one) for one in ready[task].run(loaded, options, on_progress)]
                results.extend(found)
                for line in compile_lines(one.measured for one in found):
                    if on_note is not None and line not in said:
                        on_note(line)
                    said.add(line)
                if on_results is not None:
                    on_results(found)
    return tuple(results)


def measure(loaded: Loaded, tasks: Sequence[Task | Prepared], options: Options | None = None) -> list[Measured]:
    """Measure every task on the model in its current state. Tasks may be prepared already. Raises MwtoolError."""
    options = options or Options()
    ready = [one if not isinstance(one, Task) else prepare(loaded, [one], options)[0] for one in tasks]
    return [measured for one in ready for measured in one.run(loaded, options)]


def prepare(loaded: Loaded, tasks: Sequence[Task], options: Options) -> list[Prepared]:
    """Read and check everything the tasks need, before anything runs. Raises MwtoolError."""
    return [KINDS[task.kind].prepare(loaded, task, options) for task in tasks]


def check(tasks: Sequence[Task]) -> None:
    """Check the names and files of tasks, before a model is opened. Raises MwtoolError."""
    for task in tasks:
        KINDS[task.kind].check(task)


@dataclass(frozen=True, slots=True)
class PerplexityTask:
    """A text cut into windows. compiled: the model's layers, if it is to be measured compiled."""

    task: Task
    windows: Windows
    notes: tuple[str, ...]
    compiled: Compilation | None = None

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """The perplexity of the model in its current state."""
        found = perplexity(
            loaded.model, self.windows, batch_size=options.batch_size, on_batch=on_progress, compiled=self.compiled
        )
        return [self._measured(found)]

    def under(
        self,
        loaded: Loaded,
        variants: Sequence[Variant],
        options: Options,
        on_progress: OnProgress | None = None,
        *,
        earlier: Sequence[Sequence[float]] = (),
        on_part: Callable[[Sequence[Sequence[float]]], None] | None = None,
    ) -> list[Measured]:
        """The perplexity in the current state, then under each variant, running only the layers it can change.

        earlier, on_part: as `perplexities` takes them.
        """
        found = perplexities(
            loaded.model,
            _modules(loaded),
            self.windows,
            variants,
            batch_size=options.batch_size,
            on_batch=on_progress,
            earlier=earlier,
            on_part=on_part,
            compiled=self.compiled,
        )
        return [self._measured(one) for one in found]

    def _measured(self, found: Perplexity) -> Measured:
        cut, speed = self.windows, None if self.compiled is None else self.compiled.speed
        setting = {"protocol": cut.protocol, "window": cut.length, "bos": cut.bos, "notes": list(found.notes)}
        return Measured(
            task=str(self.task),
            seconds=found.seconds,
            digest=cut.digest,
            setting=setting if speed is None else {**setting, "compile": speed.document()},
            **perplexity_of(cut.metric, found),
        )


def prepare_text(loaded: Loaded, task: Task, options: Options) -> PerplexityTask:
    """Read a text and cut it into windows. Raises MwtoolError if it cannot be read, cut or tokenized."""
    tokenizer = tokenizer_for(loaded, task)
    protocol = options.protocol or default_protocol(task.target)
    length, notes = window_for(loaded.base.config, options.window)
    bos = None if protocol_named(protocol).bos == "never" else bos_for(loaded, options)
    if bos is not None and bos.note:
        notes += (bos.note,)
    first = None if bos is None else bos.id
    cut = windows(tokenizer, text_for(task.target), protocol, length, first).first(options.limit)
    said = tuple(f"{task}: {note}" for note in (*notes, *cut.notes))
    return PerplexityTask(task, cut, said, Compilation(loaded.base, _modules(loaded)) if options.compile else None)


def _modules(loaded: Loaded) -> list[nn.Module]:
    """The decoder layers, in order."""
    return [loaded.base.get_submodule(layer.path) for layer in loaded.layers]


def attacking(
    loaded: Loaded, massive: MassiveWeights | None, attack: Attack, groups: Mapping[tuple[int, ...], Group]
) -> AbstractContextManager[None]:
    """The model under an attack of an evaluation. groups: as `evaluate` takes them. Raises BadValue without rows."""
    if attack.idle:
        return nullcontext()
    if attack.mode == "mean":
        raise BadValue(f"{attack} needs the mean values of the rows, which `mwtool ablate` measures; use that command")
    group = groups.get(attack.layers)
    if group is not None:
        edits = [Edit(target.ffn, rows_of(target, attack)) for target in group]
        return edited_together(loaded.base, edits, attack)
    if attack.layers:
        raise BadValue(f"{attack} names layers whose rows were not given; give them as groups")
    if massive is None:
        raise BadValue(f"{loaded.source.name} has no massive weights to attack with {attack}; give --massive FILE")
    return edited(loaded.base, loaded.ffn(massive), rows_of(massive, attack), attack)
