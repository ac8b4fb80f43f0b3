"""Training data: the rows of a local file, a folder or a Hub dataset, as conversations or as plain text.

Three forms, told apart by the keys of the first rows unless one is asked for:

    alpaca      instruction, output; input may be there
    messages    messages: [{role, content}], or conversations: [{from, value}]
    text        text

A file that is not JSON, JSONL or Parquet is one long text. Rows that cannot be read are named by file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from mwtool.errors import BadValue, line_of
from mwtool.files.hub_dataset import load_from_hub
from mwtool.files.text import as_object, json_object, keys_of, read_lines, read_text, shown

Form = Literal["alpaca", "messages", "text"]
Role = Literal["system", "user", "assistant"]
FORMS: tuple[Form, ...] = get_args(Form)
_NAMES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_EXPECTED = "instruction and output (alpaca), messages or conversations (messages), or text (text)"
_WANTED = "text or rows to train on"
_LOOKED_AT = 100
"""Rows whose keys decide what the form is, where the first ones are damaged."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation, or a text. where: `FILE, line N`, of an array with `, row M`."""

    where: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is left out. why: where it is and what was found."""

    why: str


@dataclass(frozen=True, slots=True)
class Data:
    """What was read. stream: whether the text is one long one, to be cut into windows."""

    name: str
    form: Form
    examples: tuple[Example, ...]
    unreadable: tuple[Unreadable, ...] = ()
    stream: bool = False


def read_data(name: str, form: Form | None = None, *, split: str = "train", skip_bad: bool = False) -> Data:
    """All rows of a local file, of a folder of files, or of a Hub dataset ``owner/name`` or ``owner/name:config``.

    Raises BadValue where there is no readable row, or any unreadable one unless `skip_bad`; ModelNotFound where a
    dataset cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() not in (".json", ".jsonl", ".ndjson", ".parquet"):
        if form not in (None, "text"):
            raise BadValue(f"{name} is read as plain text, which has no {form}; expected .json, .jsonl or .parquet")
        return Data(name, "text", (Example(name, text=read_text(path, _WANTED)),), stream=True)
    rows = list(_rows_of(name, path, split))
    if not rows:
        raise BadValue(f"{name} has no rows; expected rows of {_EXPECTED}")
    form = form or _detected(name, rows)
    read = [row if isinstance(row, Unreadable) else _example(row, form) for row in rows]
    examples = tuple(one for one in read if isinstance(one, Example))
    unreadable = tuple(one for one in read if isinstance(one, Unreadable))
    if unreadable and (not skip_bad or not examples):
        raise BadValue(complaint(name, len(rows), unreadable))
    return Data(name, form, examples, unreadable)


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    values: dict[str, Any]


def complaint(name: str, total: int, bad: Sequence[Unreadable]) -> str:
    """How many rows cannot be read, the first of them, and what to do."""
    shown = "; ".join(one.why for one in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""  # noqa: PLR2004 # as many as fit on a line
    advice = "mend them, or leave them out with --skip-bad-rows"
    if len(bad) == total:
        advice = f"expected rows of {_EXPECTED}"
    return f"{len(bad):,} of {total:,} rows of {name} cannot be read: {shown}{more}; {advice}"


def _rows_of(name: str, path: Path, split: str) -> Iterator[_Row | Unreadable]:
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return _parquet(path)
        return _json(path) if path.suffix.lower() == ".json" else _json_lines(path)
    if path.is_dir() or _hub_id(name):
        return _dataset(name, split)
    raise BadValue(f"{name} does not exist; expected a file, a folder, or a dataset of the Hub as OWNER/NAME")


def _hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not Path(name).suffix


def _json_lines(path: Path) -> Iterator[_Row | Unreadable]:
    for where, line in read_lines(path, _WANTED):
        yield _row(where, line, json_object)


def _row(where: str, found: Any, read: Callable[[str, Any], dict[str, Any]]) -> _Row | Unreadable:
    try:
        return _Row(where, read(where, found))
    except BadValue as fault:
        return Unreadable(str(fault))


def _json(path: Path) -> Iterator[_Row | Unreadable]:
    """Elements of a JSON array, each with the line it begins at; a file of one object a line is read as JSONL."""
    text = read_text(path, _WANTED)
    start = len(text) - len(text.lstrip())
    if text[start] != "[":
        yield from _json_lines(path)
        return
    decoder, at, line = json.JSONDecoder(), start + 1, 1 + text.count("\n", 0, start + 1)
    for number in count(1):
        at, line = _past(text, at, " \t\r\n", line)
        if text[at : at + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as fault:
            raise BadValue(f"{path}, line {line}: not JSON ({fault}); expected an array of objects") from fault
        yield _row(f"{path}, line {line}, row {number}", value, as_object)  # often all rows are on one line
        line += text.count("\n", at, end)
        at, line = _past(text, end, " \t\r\n", line)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise BadValue(f"{path}, line {line}: found {text[at : at + 1]!r} after a row; expected ',' or ']'")


def _past(text: str, at: int, skipped: str, line: int) -> tuple[int, int]:
    end = at
    while end < len(text) and text[end] in skipped:
        end += 1
    return end, line + text.count("\n", at, end)


def _parquet(path: Path) -> Iterator[_Row]:
    parquet = _library("pyarrow.parquet", f"{path} is a Parquet file")
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(path)
        start = 1
        for batch in file.iter_batches():
            for number, values in enumerate(batch.to_pylist(), start=start):
                yield _Row(f"{path}, row {number}", values)
            start += batch.num_rows
    except (ArrowException, OSError) as fault:
        raise BadValue(f"{path} cannot be read as Parquet: {line_of(fault, whole=True)}") from fault


def _dataset(name: str, split: str) -> Iterator[_Row]:
    datasets = _library("datasets", f"{name} is no file")
    place, _, config = name.partition(":")
    rows = load_from_hub(
        f"the dataset {name} (split {split})",
        lambda: datasets.load_dataset(place, config or None, split=split),
        "give a local file instead",
    )
    for number, values in enumerate(rows, start=1):
        yield _Row(f"{name}, row {number}", dict(values))


def _library(module: str, why: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise BadValue(f"{why}, which needs the datasets library: pip install 'mwtool[data]'") from None


def _detected(name: str, rows: Iterable[_Row | Unreadable]) -> Form:
    found = [row for row in rows if isinstance(row, _Row)][:_LOOKED_AT]
    for row in found:
        for form in FORMS:
            if isinstance(_example(row, form), Example):
                return form
    if not found:  # not one row is an object
        raise BadValue(complaint(name, len(list(rows)), tuple(row for row in rows if isinstance(row, Unreadable))))
    raise BadValue(f"{found[0].where}: the keys are {keys_of(found[0].values)}; expected {_EXPECTED}")


def _example(row: _Row, form: Form) -> Example | Unreadable:
    if form == "text":
        text = row.values.get("text")
        said = isinstance(text, str) and text.strip()
        return Example(row.where, text=text) if said else _wrong(row, "text", "a text")
    return _alpaca(row) if form == "alpaca" else _messages(row)


def _alpaca(row: _Row) -> Example | Unreadable:
    instruction, output, more = (row.values.get(key) for key in ("instruction", "output", "input"))
    if not isinstance(instruction, str) or not instruction.strip():
        return _wrong(row, "instruction", "a text")
    if not isinstance(output, str) or not output.strip():
        return _wrong(row, "output", "a text")
    if not (more is None or isinstance(more, str)):
        return _wrong(row, "input", "a text, or nothing")
    asked = f"{instruction}\n\n{more}" if more else instruction
    return Example(row.where, (Turn("user", asked), Turn("assistant", output)))


def _messages(row: _Row) -> Example | Unreadable:
    key = "conversations" if "conversations" in row.values else "messages"
    given = row.values.get(key)
    if not isinstance(given, list):
        return _wrong(row, key, "a list of messages")
    turns = []
    for number, one in enumerate(given, start=1):
        values = one if isinstance(one, dict) else {}
        role, content = values.get("role", values.get("from")), values.get("content", values.get("value"))
        if not isinstance(role, str) or role not in _NAMES or not isinstance(content, str):
            return Unreadable(f"{row.where}: message {number} has no role (system, user, assistant) and content")
        turns.append(Turn(_NAMES[role], content))
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        return Unreadable(f"{row.where}: no message of the assistant; there is nothing to train on")
    return Example(row.where, tuple(turns))


def _wrong(row: _Row, key: str, expected: str) -> Unreadable:
    if key not in row.values:
        return Unreadable(f"{row.where}: has no {key} (but {keys_of(row.values)})")
    return Unreadable(f"{row.where}: {key} is {shown(row.values[key])}; expected {expected}")
