"""One evaluation: a model as it stands, or under each attack, times tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mwtool.errors import BadValue
from mwtool.evaluation.corpora import DATASETS, default_protocol, text_for
from mwtool.evaluation.generation import prepare_answers
from mwtool.evaluation.harness import check_name, check_rows, prepare_named, prepare_rows
from mwtool.evaluation.measurement import Measured, OnProgress, Options, bos_for, perplexity_of, tokenizer_for
from mwtool.evaluation.perplexity import Perplexity, perplexity
from mwtool.evaluation.prefix_reuse import Variant, perplexities
from mwtool.evaluation.tasks import Task, read_prompts
from mwtool.evaluation.windows import Windows, window_for, windows
from mwtool.massive import MassiveWeights
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, Edit, edited, edited_together, rows_of

OnTask = Callable[[int, int, str], OnProgress | None]
"""Called before a task with tasks done, tasks in all, and what comes; may return what to call on progress."""


class Prepared(Protocol):
    """A task ready to run on a model: texts read and cut, once for all attacks."""

    @property
    def task(self) -> Task:
        """What was asked for."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided on the user's behalf."""
        ...

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Measure the model as it stands."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """A figure under an attack."""

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
    """Every task under every attack, on one loaded model, each text cut once.

    on_results: called with a task's figures as it ends. done: attack and task, as text, to leave out.
    groups: rows of the layers an attack names; under () those of attacks that name none, in place of `massive`.
    Raises BadValue if an attack needs massive weights there are none of, before anything runs.
    """
    options = options or Options()
    left = [(attack, task) for attack in attacks for task in tasks if (str(attack), str(task)) not in done]
    wanted = dict.fromkeys(attack for attack, _ in left)
    for attack in wanted:
        with _attacking(
            loaded, massive, attack, groups or {}
        ):  # changing nothing yet: a refusal comes before hours of measuring
            pass
    needed = dict.fromkeys(task for _, task in left)
    ready = dict(zip(needed, prepare(loaded, list(needed), options), strict=True))
    for line in dict.fromkeys(line for one in ready.values() for line in one.notes):
        if on_note is not None:
            on_note(line)
    results: list[Result] = []
    over = 0
    for attack in wanted:
        with _attacking(loaded, massive, attack, groups or {}):
            for task in (task for other, task in left if other == attack):
                on_progress = None if on_task is None else on_task(over, len(left), f"{attack}, {task}")
                over += 1
                found = [Result(attack, one) for one in ready[task].run(loaded, options, on_progress)]
                results.extend(found)
                if on_results is not None:
                    on_results(found)
    return tuple(results)


def measure(loaded: Loaded, tasks: Sequence[Task | Prepared], options: Options | None = None) -> list[Measured]:
    """Every task on the model as it stands; tasks that are prepared already are not prepared again."""
    options = options or Options()
    ready = [one if not isinstance(one, Task) else prepare(loaded, [one], options)[0] for one in tasks]
    return [measured for one in ready for measured in one.run(loaded, options)]


def prepare(loaded: Loaded, tasks: Sequence[Task], options: Options) -> list[Prepared]:
    """Read and check everything tasks need, before anything runs. Raises MwtoolError."""
    return [_prepared(loaded, task, options) for task in tasks]


def check(tasks: Sequence[Task]) -> None:
    """What can be said against tasks before a model is opened: names and files. Raises MwtoolError."""
    for task in tasks:
        if task.kind == "harness":
            check_name(task, task.target)
        elif task.kind == "generate":
            read_prompts(Path(task.target))
        elif task.kind != "ppl":
            check_rows(task)
        elif task.target not in DATASETS:
            text_for(task.target)


def _prepared(loaded: Loaded, task: Task, options: Options) -> Prepared:
    if task.kind == "ppl" and (task.target, options.protocol) == ("wikitext2", "word"):
        return prepare_named(loaded, task, options, name="wikitext")  # it has the articles; the dataset has lines
    if task.kind == "ppl":
        return _texts(loaded, task, options)
    if task.kind == "generate":
        return prepare_answers(loaded, task, options)
    return prepare_rows(loaded, task, options) if task.kind in ("mc", "cloze") else prepare_named(loaded, task, options)


@dataclass(frozen=True, slots=True)
class PerplexityTask:
    """A text cut into windows."""

    task: Task
    windows: Windows
    notes: tuple[str, ...]

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """The perplexity of the model as it stands."""
        return [
            self._measured(perplexity(loaded.model, self.windows, batch_size=options.batch_size, on_batch=on_progress))
        ]

    def under(
        self, loaded: Loaded, variants: Sequence[Variant], options: Options, on_progress: OnProgress | None = None
    ) -> list[Measured]:
        """The perplexity of the model as it stands, then under each variant, running only the layers it can change."""
        layers = [loaded.base.get_submodule(layer.path) for layer in loaded.layers]
        found = perplexities(
            loaded.model, layers, self.windows, variants, batch_size=options.batch_size, on_batch=on_progress
        )
        return [self._measured(one) for one in found]

    def _measured(self, found: Perplexity) -> Measured:
        cut = self.windows
        return Measured(
            task=str(self.task),
            seconds=found.seconds,
            digest=cut.digest,
            setting={"protocol": cut.protocol, "window": cut.length, "bos": cut.bos, "notes": list(found.notes)},
            **perplexity_of(cut.metric, found),
        )


def _texts(loaded: Loaded, task: Task, options: Options) -> PerplexityTask:
    tokenizer = tokenizer_for(loaded, task)
    protocol = options.protocol or default_protocol(task.target)
    length, notes = window_for(loaded.base.config, options.window)
    bos = None if protocol == "sun-4096" else bos_for(loaded, options)
    if bos is not None and bos.note:
        notes += (bos.note,)
    first = None if bos is None else bos.id
    cut = windows(tokenizer, text_for(task.target), protocol, length, first).first(options.limit)
    return PerplexityTask(task, cut, tuple(f"{task}: {note}" for note in (*notes, *cut.notes)))


def _attacking(
    loaded: Loaded, massive: MassiveWeights | None, attack: Attack, groups: Mapping[tuple[int, ...], Group]
) -> AbstractContextManager[None]:
    if attack.idle:
        return nullcontext()
    if attack.mode == "mean":
        raise BadValue(f"{attack} needs mean values of the rows, which `mwtool ablate` gathers; use it instead")
    group = groups.get(attack.layers)
    if group is not None:
        edits = [Edit(target.ffn, rows_of(target, attack)) for target in group]
        return edited_together(loaded.base, edits, attack)
    if attack.layers:
        raise BadValue(f"{attack} names layers whose rows were not given; give them as groups")
    if massive is None:
        raise BadValue(f"{loaded.source.name} has no massive weights to attack with {attack}; give --massive FILE")
    return edited(loaded.base, loaded.ffn(massive), rows_of(massive, attack), attack)
