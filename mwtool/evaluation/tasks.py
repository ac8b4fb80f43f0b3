"""What can be measured, as it is named on the command line, and the rows of local files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mwtool.errors import BadValue, nearest
from mwtool.files.text import json_object, keys_of, read_lines, shown

Kind = Literal["ppl", "mc", "cloze", "generate", "harness"]
PAPER = ("arc_easy", "arc_challenge", "boolq", "piqa", "winogrande")
"""The zero-shot tasks of the paper."""
EXPECTED = "ppl:demo, ppl:FILE, ppl:wikitext2, ppl:c4, ppl:pg19, mc:FILE.jsonl, cloze:FILE.jsonl, generate:FILE, "
EXPECTED += "paper, or a task of lm-evaluation-harness"


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to measure.

    kind: `harness` is a task of lm-evaluation-harness, `target` then its name; for the others `target` is a file,
    `demo`, or the name of a dataset.
    """

    kind: Kind
    target: str

    def __str__(self) -> str:
        return self.target if self.kind == "harness" else f"{self.kind}:{self.target}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One multiple-choice question: `contexts` and `endings` differ in one of the two, and the other is repeated.

    gold: index of the right one.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Cloze:
    """A text and the continuation a model should prefer to all others."""

    context: str
    continuation: str


def parse_task(text: str) -> Task:
    """A task by its name. Whether lm-evaluation-harness has a task of that name is seen when it is prepared.

    Raises BadValue, with the names that are near.
    """
    kind, colon, target = text.partition(":")
    kinds = [known for known in get_args(Kind) if known != "harness"]
    if not colon and text and text not in kinds:
        return Task("harness", text)
    if kind not in kinds:
        advice = nearest(kind, kinds, f"expected {EXPECTED}", shown=lambda near: f"{near}:{target}")
        raise BadValue(f"task {text!r} is not known; {advice}")
    if not target:
        raise BadValue(f"task {text!r} says no file; expected {EXPECTED}")
    return Task(kind, target)  # type: ignore[arg-type] # one of the kinds, as just seen


def parse_tasks(texts: Iterable[str]) -> tuple[Task, ...]:
    """Tasks by their names, each once, `paper` being five. Raises BadValue."""
    names = [name for text in texts for name in (PAPER if text == "paper" else (text,))]
    return tuple(dict.fromkeys(map(parse_task, names)))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects, one a line, each with `FILE, line N`. Raises BadValue."""
    for where, line in read_lines(path):
        yield where, json_object(where, line)


def read_choices(path: Path) -> tuple[Choice, ...]:
    """Rows of `query`, `choices` and `gold`, or of `context_options`, `continuation` and `gold`. Raises BadValue."""
    return tuple(_choice(where, row) for where, row in read_rows(path))


def read_cloze(path: Path) -> tuple[Cloze, ...]:
    """Rows of `context` and `continuation`. Raises BadValue."""
    return tuple(
        Cloze(_string(where, row, "context"), _string(where, row, "continuation")) for where, row in read_rows(path)
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, or in a .jsonl file rows of `prompt`. Raises BadValue."""
    if path.suffix == ".jsonl":
        return tuple(_string(where, row, "prompt") for where, row in read_rows(path))
    return tuple(line for _, line in read_lines(path))


def _choice(where: str, row: dict[str, Any]) -> Choice:
    options = "context_options" if "context_options" in row else "choices"
    several, gold = _strings(where, row, options), row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(several):
        raise BadValue(f"{where}: gold is {gold!r}; expected an index from 0 to {len(several) - 1}")
    one = _string(where, row, "continuation" if options == "context_options" else "query")
    repeated = (one,) * len(several)
    return Choice(several, repeated, gold) if options == "context_options" else Choice(repeated, several, gold)


def _string(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise BadValue(f"{where}: {key} is {_found(row, key)}; expected a text")
    return value


def _strings(where: str, row: dict[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(one, str) and one for one in values):  # noqa: PLR2004 # a choice is between two at least
        raise BadValue(f"{where}: {key} is {_found(row, key)}; expected a list of at least two texts")
    return tuple(values)


def _found(row: dict[str, Any], key: str) -> str:
    return shown(row[key]) if key in row else f"absent (the row has {keys_of(row)})"
