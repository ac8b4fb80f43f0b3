"""One evaluation: a model as it stands, or under each attack, times tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from mwtool.bos import find_bos
from mwtool.errors import BadValue
from mwtool.load import Loaded
from mwtool.massive import MassiveWeights
from mwtool.perplexity import LENGTH, Windows, perplexity, windows
from mwtool.perplexity import Protocol as Cut
from mwtool.surgery import Attack, edited, rows_of
from mwtool.tasks import Task
from mwtool.texts import default_protocol, text_for

OnProgress = Callable[[int, int], None]
"""Called with what is done of the task in hand, and of how much."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    batch_size: windows, questions or prompts at once; None: about 8,192 tokens of windows, 16 of the others.
    limit: the first so many of them. protocol, window: how a text is cut (None: as the task or the model says).
    bos: as `--bos`. delimiter: between context and continuation in local files. new_tokens: an answer's most.
    """

    batch_size: int | None = None
    limit: int | None = None
    seed: int = 0
    protocol: Cut | None = None
    window: int | None = None
    bos: str = "auto"
    delimiter: str = " "
    new_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure.

    value: nan or inf where `nonfinite` says why. stderr: standard error; None where there is none.
    n: samples: windows (documents under `word`), questions, prompts. samples: one value each: the sum of -ln p for a
    perplexity, whose denominators are `weights`; else what is averaged. digest: the same where the samples are.
    setting: what else it takes to repeat it. answers: generated texts.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    seconds: float
    samples: tuple[float, ...] = ()
    weights: tuple[float, ...] | None = None
    higher_is_better: bool = True
    nonfinite: str | None = None
    digest: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()


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
    on_result: Callable[[Result], None] | None = None,
    on_task: Callable[[Attack, Prepared], OnProgress | None] | None = None,
    done: Collection[tuple[str, str]] = (),
) -> tuple[Result, ...]:
    """Every task under every attack, on one loaded model, each text cut once.

    on_result: called as each figure is there. on_task: called before a task; may return what to call on progress.
    done: attack and task, as text, to leave out. Raises BadValue if an attack needs massive weights there are none of.
    """
    options = options or Options()
    contexts = [(attack, _attacking(loaded, massive, attack)) for attack in attacks]
    ready = prepare(loaded, tasks, options)
    results: list[Result] = []
    for attack, context in contexts:
        left = [one for one in ready if (str(attack), str(one.task)) not in done]
        if not left:
            continue
        with context:
            for one in left:
                on_progress = None if on_task is None else on_task(attack, one)
                for measured in one.run(loaded, options, on_progress):
                    results.append(Result(attack, measured))
                    if on_result is not None:
                        on_result(results[-1])
    return tuple(results)


def measure(loaded: Loaded, tasks: Sequence[Task | Prepared], options: Options | None = None) -> list[Measured]:
    """Every task on the model as it stands; tasks that are prepared already are not prepared again."""
    options = options or Options()
    ready = [one if not isinstance(one, Task) else prepare(loaded, [one], options)[0] for one in tasks]
    return [measured for one in ready for measured in one.run(loaded, options)]


def prepare(loaded: Loaded, tasks: Sequence[Task], options: Options) -> list[Prepared]:
    """Read and check everything tasks need, before anything runs. Raises MwtoolError."""
    return [_prepared(loaded, task, options) for task in tasks]


def _prepared(loaded: Loaded, task: Task, options: Options) -> Prepared:
    if task.kind == "ppl" and not (task.target == "wikitext2" and options.protocol == "word"):
        return _texts(loaded, task, options)
    raise BadValue(f"task {task}: not there yet")


@dataclass(frozen=True, slots=True)
class _Perplexity:
    task: Task
    windows: Windows
    notes: tuple[str, ...]

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        found = perplexity(loaded.model, self.windows, batch_size=options.batch_size, on_batch=on_progress)
        cut = self.windows
        return [
            Measured(
                task=str(self.task),
                metric=cut.metric,
                value=found.value,
                stderr=found.stderr,
                n=len(found.nll),
                seconds=found.seconds,
                samples=found.nll,
                weights=tuple(map(float, found.counts)),
                higher_is_better=False,
                nonfinite=found.nonfinite,
                digest=cut.digest,
                setting={"protocol": cut.protocol, "window": cut.length, "bos": cut.bos, "notes": list(found.notes)},
            )
        ]


def _texts(loaded: Loaded, task: Task, options: Options) -> _Perplexity:
    if loaded.tokenizer is None:
        raise BadValue(f"{loaded.source.name} has no tokenizer; {task} needs one to read text")
    protocol = options.protocol or default_protocol(task.target)
    length, notes = window_for(loaded, options.window, protocol)
    bos = None
    if protocol != "sun-4096":
        found = find_bos(options.bos, loaded.tokenizer, loaded.base.config)
        bos = found.id
        notes += (found.note,) if found.note else ()
    cut = windows(loaded.tokenizer, text_for(task.target), protocol, length, bos).first(options.limit)
    return _Perplexity(task, cut, tuple(f"{task}: {note}" for note in (*notes, *cut.notes)))


def window_for(loaded: Loaded, asked: int | None, protocol: Cut) -> tuple[int, tuple[str, ...]]:
    """Tokens in a window: as asked, else 4096, and no more than the model has positions for."""
    wanted, most = asked or LENGTH, positions(loaded)
    if most is None or wanted <= most:
        return wanted, ()
    said = asked is not None or protocol in ("sun-4096", "bos-4096")
    return most, (f"windows of {wanted} tokens are shortened to the {most} the model has",) if said else ()


def positions(loaded: Loaded) -> int | None:
    """Positions the model has, by its configuration; None where it sets no bound."""
    config = loaded.base.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def _attacking(loaded: Loaded, massive: MassiveWeights | None, attack: Attack) -> AbstractContextManager[None]:
    if attack.idle:
        return nullcontext()
    if attack.mode == "mean":
        raise BadValue(f"{attack} needs mean values of the rows, which `mwtool ablate` gathers; use it instead")
    if massive is None:
        raise BadValue(f"{loaded.source.name} has no massive weights to attack with {attack}; give --massive FILE")
    return edited(loaded.base, loaded.ffn(massive), rows_of(massive, attack), attack)
