"""Training data: the records of a local file, a folder or a Hub dataset.

A file that is not JSON, JSONL or Parquet is one long text. Every record is read or is named, with its file and line,
and the reason why it cannot be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue, line_of
from mwtool.files.hub_dataset import load_from_hub
from mwtool.files.text import as_object, json_object, keys_of, read_lines, read_text
from mwtool.finetune.records import EXPECTED, Example, Form, Unreadable, form_of, read_record

_WANTED = "text or records to train on"
_LOOKED_AT = 100
"""Records whose keys decide what the form is, where the first ones are damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What was read.

    stream: whether it is one long text, to be cut into windows.
    """

    name: str
    form: Form
    examples: tuple[Example, ...]
    unreadable: tuple[Unreadable, ...] = ()
    stream: bool = False


@dataclass(frozen=True, slots=True)
class _Record:
    where: str
    values: dict[str, Any]


def read_data(name: str, form: Form | None = None, *, split: str = "train", skip_bad: bool = False) -> Data:
    """All records of a local file, of a folder of files, or of a Hub dataset ``owner/name`` or ``owner/name:config``.

    form: how records are read; None: as the keys of the first ones say. skip_bad: leave out records that cannot be
    read. Raises BadValue where no record can be read, or one cannot without `skip_bad`; ModelNotFound where a dataset
    cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() not in (".json", ".jsonl", ".ndjson", ".parquet"):
        if form not in (None, "text"):
            raise BadValue(f"{name} is read as plain text, which has no {form}; expected .json, .jsonl or .parquet")
        text = read_text(path, _WANTED)
        return Data(name=name, form="text", examples=(Example(where=name, text=text),), stream=True)
    found = list(_records_of(name, path, split))
    if not found:
        raise BadValue(f"{name} has no records; expected records of {EXPECTED}")
    form = form or _detected(name, found)
    read = [one if isinstance(one, Unreadable) else read_record(one.where, one.values, form) for one in found]
    examples = tuple(one for one in read if isinstance(one, Example))
    unreadable = tuple(one for one in read if isinstance(one, Unreadable))
    if unreadable and (not skip_bad or not examples):
        raise BadValue(complaint(name, len(found), unreadable))
    return Data(name=name, form=form, examples=examples, unreadable=unreadable)


def complaint(name: str, total: int, bad: Sequence[Unreadable], advice: str = f"expected records of {EXPECTED}") -> str:
    """How many records cannot be read, the first three of them, and what to do.

    advice: what to do where not one of them can be read.
    """
    shown = "; ".join(one.why for one in bad[:3])
    more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""  # noqa: PLR2004 # as many as fit on a line
    if len(bad) < total:
        advice = "mend them, or leave them out with --skip-bad-rows"
    return f"{len(bad):,} of {total:,} records of {name} cannot be read: {shown}{more}; {advice}"


def _records_of(name: str, path: Path, split: str) -> Iterator[_Record | Unreadable]:
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return _parquet(path)
        return _json(path) if path.suffix.lower() == ".json" else _json_lines(path)
    if path.is_dir() or _hub_id(name):
        return _dataset(name, split)
    raise BadValue(f"{name} does not exist; expected a file, a folder, or a dataset of the Hub as OWNER/NAME")


def _hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and not Path(name).suffix


def _json_lines(path: Path) -> Iterator[_Record | Unreadable]:
    for where, line in read_lines(path, _WANTED):
        try:
            yield _Record(where, json_object(where, line))
        except BadValue as fault:
            yield Unreadable(str(fault))


def _record(where: str, value: Any) -> _Record | Unreadable:
    try:
        return _Record(where, as_object(where, value))
    except BadValue as fault:
        return Unreadable(str(fault))


def _json(path: Path) -> Iterator[_Record | Unreadable]:
    """Elements of a JSON array, each with the line it begins at; a file of one object a line is read as JSONL."""
    text = read_text(path, _WANTED, damaged=True)
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
        yield _record(f"{path}, line {line}, record {number}", value)  # often all records are on one line
        line += text.count("\n", at, end)
        at, line = _past(text, end, " \t\r\n", line)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise BadValue(f"{path}, line {line}: found {text[at : at + 1]!r} after a record; expected ',' or ']'")


def _past(text: str, at: int, skipped: str, line: int) -> tuple[int, int]:
    end = at
    while end < len(text) and text[end] in skipped:
        end += 1
    return end, line + text.count("\n", at, end)


def _parquet(path: Path) -> Iterator[_Record | Unreadable]:
    parquet = _library("pyarrow.parquet", f"{path} is a Parquet file")
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(path)
        start = 1
        for batch in file.iter_batches():
            for number in range(batch.num_rows):
                where = f"{path}, record {start + number}"
                yield _read_one(where, partial(_cell, batch, number))
            start += batch.num_rows
    except (ArrowException, OSError) as fault:
        raise BadValue(f"{path} cannot be read as Parquet: {line_of(fault, whole=True)}") from fault


def _cell(batch: Any, number: int) -> Any:
    return batch.slice(number, 1).to_pylist()[0]


def _dataset(name: str, split: str) -> Iterator[_Record | Unreadable]:
    datasets = _library("datasets", f"{name} is not a file")
    place, _, config = name.partition(":")
    records = load_from_hub(
        f"the dataset {name} (split {split})",
        lambda: datasets.load_dataset(place, config or None, split=split),
        "give a local file instead",
    )
    for number in range(len(records)):
        yield _read_one(f"{name}, record {number + 1}", partial(records.__getitem__, number))


def _read_one(where: str, read: Callable[[], Any]) -> _Record | Unreadable:
    """A record of an Arrow table, whose strings may hold bytes that are not UTF-8."""
    try:
        return _record(where, read())
    except UnicodeDecodeError as fault:
        return Unreadable(f"{where}: not UTF-8 text (byte {fault.object[fault.start]:#04x}); save it as UTF-8")


def _library(module: str, why: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise BadValue(f"{why}, which needs the datasets library: pip install 'mwtool[data]'") from None


def _detected(name: str, records: Sequence[_Record | Unreadable]) -> Form:
    """The form of the first record that can be read, else the one whose keys most of the first records have."""
    found = [one for one in records if isinstance(one, _Record)][:_LOOKED_AT]
    if not found:  # not one record is an object
        raise BadValue(complaint(name, len(records), [one for one in records if isinstance(one, Unreadable)]))
    forms: Counter[Form] = Counter()
    for one in found:
        form = form_of(one.values)
        if form is not None and isinstance(read_record(one.where, one.values, form), Example):
            return form
        forms.update([] if form is None else [form])
    if not forms:
        pair = {"prompt", "completion"} <= found[0].values.keys()  # as TRL names them, with or without messages in them
        advice = "; rename prompt and completion, or join the messages in them under messages" if pair else ""
        raise BadValue(f"{found[0].where}: the keys are {keys_of(found[0].values)}; expected {EXPECTED}{advice}")
    return forms.most_common(1)[0][0]
