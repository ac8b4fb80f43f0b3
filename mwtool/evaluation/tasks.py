"""Tasks: what can be measured, how the command line names it, and the records of local files.

A kind of task is one entry of `KINDS`. This module imports neither torch nor lm-evaluation-harness: the command line
reads the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadValue, nearest
from mwtool.files.text import json_object, keys_of, read_lines, refuse_half_pairs, shown

if TYPE_CHECKING:
    from mwtool.evaluation.config import Options
    from mwtool.evaluation.evaluate import Prepared
    from mwtool.models.load import Loaded

HARNESS = "harness"
"""The kind of a name without a colon."""
PAPER = ("arc_easy", "arc_challenge", "boolq", "piqa", "winogrande")
"""The zero-shot tasks of the paper."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to measure.

    kind: a key of `KINDS`. target: a file, `demo`, or the name of a dataset; of the kind `harness`, the name of a
    task of lm-evaluation-harness.
    """

    kind: str
    target: str

    def __str__(self) -> str:
        return self.target if self.kind == HARNESS else f"{self.kind}:{self.target}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task, named `KIND:TARGET` on the command line.

    spelling: how messages and help list it. check: raises MwtoolError if the target cannot be measured, before a model
    is opened. prepare: reads everything the task needs, once for all attacks, and raises MwtoolError.
    """

    spelling: str
    check: Callable[[Task], object]
    prepare: Callable[[Loaded, Task, Options], Prepared]


@dataclass(frozen=True, slots=True)
class Choice:
    """One multiple-choice question: either the contexts or the endings differ, and the other is repeated.

    gold: index of the right choice.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Cloze:
    """A text and the continuation a model should prefer to all others."""

    context: str
    continuation: str


def expected() -> str:
    """Every spelling of a task, for messages and help."""
    return ", ".join(kind.spelling for kind in KINDS.values())


def parse_task(text: str) -> Task:
    """Parse the name of a task. Whether lm-evaluation-harness has a task of that name is checked later.

    Raises BadValue, which suggests the most similar kind.
    """
    kind, colon, target = text.partition(":")
    kinds = [known for known in KINDS if known != HARNESS]
    if not colon and text and (text not in kinds or text == "longbench"):  # also a group of the harness
        return Task(HARNESS, text)
    if kind not in kinds:
        advice = nearest(kind, kinds, f"expected {expected()}", shown=lambda near: f"{near}:{target}")
        raise BadValue(f"unknown task {text!r}; {advice}")
    if not target:
        raise BadValue(f"task {text!r} names no file; expected {expected()}")
    return Task(kind, target)


def parse_tasks(texts: Iterable[str]) -> tuple[Task, ...]:
    """Parse names of tasks and drop repeated ones; `paper` stands for five. Raises BadValue as `parse_task` does."""
    names = [name for text in texts for name in (PAPER if text == "paper" else (text,))]
    return tuple(dict.fromkeys(map(parse_task, names)))


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one per line, each with its place as `FILE, line N`. Raises BadValue."""
    for where, line in read_lines(path):
        yield where, json_object(where, line)


def read_choices(path: Path) -> tuple[Choice, ...]:
    """Records of `query`, `choices` and `gold`, or of `context_options`, `continuation` and `gold`. Raises BadValue."""
    return tuple(_choice(where, record) for where, record in read_records(path))


def read_cloze(path: Path) -> tuple[Cloze, ...]:
    """Records of `context` and `continuation`. Raises BadValue."""
    return tuple(
        Cloze(_string(where, record, "context"), _string(where, record, "continuation"))
        for where, record in read_records(path)
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line, or records of `prompt` in a .jsonl file. Raises BadValue."""
    if path.suffix == ".jsonl":
        return tuple(_string(where, record, "prompt") for where, record in read_records(path))
    lines = list(read_lines(path))
    for where, line in lines:
        refuse_half_pairs(where, line)
    return tuple(line for _, line in lines)


def read_references(path: Path) -> tuple[str | None, ...]:
    """The `reference` of each record that has one, a right answer to its prompt. Raises BadValue."""
    if path.suffix != ".jsonl":
        return (None,) * len(list(read_lines(path)))
    return tuple(
        _string(where, record, "reference") if "reference" in record else None for where, record in read_records(path)
    )


def _choice(where: str, record: dict[str, Any]) -> Choice:
    options = "context_options" if "context_options" in record else "choices"
    several, gold = _strings(where, record, options), record.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(several):
        raise BadValue(f"{where}: gold is {gold!r}; expected an index from 0 to {len(several) - 1}")
    one = _string(where, record, "continuation" if options == "context_options" else "query")
    repeated = (one,) * len(several)
    return Choice(several, repeated, gold) if options == "context_options" else Choice(repeated, several, gold)


def _string(where: str, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise BadValue(f"{where}: {key} is {_found(record, key)}; expected a non-empty string")
    return value


def _strings(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    values = record.get(key)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(one, str) and one for one in values):  # noqa: PLR2004 # a choice needs two
        raise BadValue(f"{where}: {key} is {_found(record, key)}; expected a list of at least two non-empty strings")
    return tuple(values)


def _found(record: dict[str, Any], key: str) -> str:
    return shown(record[key]) if key in record else f"missing (the record has {keys_of(record)})"


def _check_text(task: Task) -> None:
    from mwtool.evaluation.corpora import DATASETS, text_for

    if task.target not in DATASETS:
        text_for(task.target)


def _prepare_text(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.evaluate import prepare_text
    from mwtool.evaluation.harness import prepare_harness

    if (task.target, options.protocol) == ("wikitext2", "word"):  # the dataset has lines, the harness has articles
        return prepare_harness(loaded, task, options, name="wikitext")
    return prepare_text(loaded, task, options)


def _check_questions(task: Task) -> None:
    from mwtool.evaluation.questions import read_questions

    read_questions(task)


def _prepare_questions(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.questions import prepare_questions

    return prepare_questions(loaded, task, options)


def _prepare_prompts(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.generation import prepare_prompts

    return prepare_prompts(loaded, task, options)


def _check_judged(task: Task) -> None:
    read_prompts(Path(task.target))
    read_references(Path(task.target))


def _prepare_judged(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.judge import prepare_judged

    return prepare_judged(loaded, task, options)


def _check_longbench(task: Task) -> None:
    from mwtool.evaluation.longbench import read_longbench

    read_longbench(Path(task.target))


def _prepare_longbench(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.longbench import prepare_longbench

    return prepare_longbench(loaded, task, options)


def _check_harness(task: Task) -> None:
    from mwtool.evaluation.harness import check_name

    check_name(task, task.target)


def _prepare_harness(loaded: Loaded, task: Task, options: Options) -> Prepared:
    from mwtool.evaluation.harness import prepare_harness

    return prepare_harness(loaded, task, options)


KINDS: dict[str, Kind] = {
    "ppl": Kind("ppl:demo, ppl:FILE, ppl:wikitext2, ppl:c4, ppl:pg19", _check_text, _prepare_text),
    "mc": Kind("mc:FILE.jsonl", _check_questions, _prepare_questions),
    "cloze": Kind("cloze:FILE.jsonl", _check_questions, _prepare_questions),
    "generate": Kind("generate:FILE", lambda task: read_prompts(Path(task.target)), _prepare_prompts),
    "judge": Kind("judge:FILE", _check_judged, _prepare_judged),
    "longbench": Kind("longbench:FILE.jsonl", _check_longbench, _prepare_longbench),
    HARNESS: Kind("paper, or a task of lm-evaluation-harness", _check_harness, _prepare_harness),
}
"""Every kind of task by the name before the colon. Functions import what they need when they are called."""
