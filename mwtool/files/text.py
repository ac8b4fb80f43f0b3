"""A file of text that a person made: all of it, its lines, or the JSON objects on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwtool.errors import BadCheckpoint, BadValue, line_of


def read_text(path: Path, expected: str = "text") -> str:
    """A UTF-8 file that is not empty, without the byte order mark that some editors begin it with. Raises BadValue."""
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise BadValue(link_fault(path) or f"{path} does not exist; expected a file") from None
    except UnicodeDecodeError as fault:
        raise BadValue(f"{path} is not UTF-8 text: byte {fault.start} is {fault.object[fault.start]:#04x}") from fault
    except OSError as fault:
        raise BadValue(f"{path} cannot be read: {fault.strerror}") from fault
    if not text.strip():
        raise BadValue(f"{path} is empty; expected {expected}")
    return text


def read_lines(path: Path, expected: str = "text") -> Iterator[tuple[str, str]]:
    """Its lines but blank ones, each with `FILE, line N`. Raises BadValue.

    They end with a line feed alone: a text within JSON may hold what Unicode counts as other ends of lines.
    """
    for number, line in enumerate(read_text(path, expected).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def json_object(where: str, line: str) -> dict[str, Any]:
    """The JSON object that a line holds. Raises BadValue that begins with `where`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise BadValue(f"{where}: not JSON ({fault}); expected one JSON object a line") from fault
    return as_object(where, value)


def as_object(where: str, value: Any) -> dict[str, Any]:
    """A JSON value that is an object. Raises BadValue that begins with `where`."""
    if not isinstance(value, dict):
        raise BadValue(f"{where}: holds a {type(value).__name__}; expected a JSON object")
    return value


def shown(value: object) -> str:
    """A value as a message shows it, which is one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."  # noqa: PLR2004 # as much as the line has room for


def keys_of(row: dict[str, Any]) -> str:
    """The keys a message lists."""
    return ", ".join(sorted(row)[:8]) or "no keys"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises BadCheckpoint if it is absent or is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fault = link_fault(path)
        if fault is not None:
            raise BadCheckpoint(f"{fault}; get the file again, or point the link at it") from None
        raise BadCheckpoint(f"{path.parent} has no {path.name}; expected a model in Hugging Face format") from None
    except RecursionError:
        raise BadCheckpoint(f"{path} is nested too deeply; expected a JSON object") from None
    except (OSError, ValueError) as fault:
        raise BadCheckpoint(f"{path} cannot be read: {line_of(fault)}") from fault
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def link_fault(path: Path) -> str | None:
    """Why a link leads nowhere, as a sentence; None for anything that is not such a link."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    return None
