"""Text files: the whole text, the lines, or one JSON object a line; every failure is one line of a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwtool.errors import BadCheckpoint, BadValue, line_of


def read_text(path: Path, expected: str = "text", *, damaged: bool = False) -> str:
    """A UTF-8 file that is not empty, without the byte order mark that some editors begin it with.

    damaged: let bytes that are not UTF-8 through, each as one of U+DC80 to U+DCFF, for whoever refuses a part of a
    file and not all of it (`refuse_half_pairs`). Raises BadValue.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadValue(link_fault(path) or f"{path} does not exist; expected a file") from None
    except OSError as fault:
        raise BadValue(f"{path} cannot be read: {fault.strerror}") from fault
    except ValueError as fault:
        raise BadValue(f"{str(path)!r} cannot be the name of a file: {fault}") from fault
    try:
        text = data.decode("utf-8", "surrogateescape" if damaged else "strict")
    except UnicodeDecodeError as fault:
        line = 1 + data.count(b"\n", 0, fault.start)
        raise BadValue(
            f"{path} is not UTF-8 text: byte {fault.start} is {data[fault.start]:#04x} (line {line}); save it as UTF-8"
        ) from fault
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    if not text.strip():
        raise BadValue(f"{path} is empty; expected {expected}")
    return text


def read_lines(path: Path, expected: str = "text") -> Iterator[tuple[str, str]]:
    """The lines of a file except blank ones, each with `FILE, line N`. Raises BadValue.

    Only a line feed ends a line: JSON strings may contain the other line separators of Unicode. A line that is not
    UTF-8 is yielded with what `refuse_half_pairs` refuses, so that one bad line does not cost the others.
    """
    for number, line in enumerate(read_text(path, expected, damaged=True).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def refuse_half_pairs(where: str, value: Any) -> None:
    """Raise BadValue, beginning with `where`, if a string in a JSON value contains half of a surrogate pair.

    Such a string has no UTF-8 form, and no tokenizer takes it. It comes from text cut inside an emoji, or
    stands for a byte that is not UTF-8 (`read_lines`).
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except RecursionError:
        raise BadValue(f"{where}: nested too deeply; expected one JSON object a line") from None
    except UnicodeEncodeError as fault:
        code = ord(text[fault.start])
        if 0xDC80 <= code <= 0xDCFF:  # noqa: PLR2004 # as surrogateescape writes bytes
            raise BadValue(f"{where}: not UTF-8 text (byte {code - 0xDC00:#04x}); save it as UTF-8") from None
        raise BadValue(
            f"{where}: contains half of a surrogate pair (\\u{code:04x}), which is no character; remove it, or write "
            f"both halves"
        ) from None


def json_object(where: str, line: str) -> dict[str, Any]:
    """The JSON object on a line. Raises BadValue, beginning with `where`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as fault:
        refuse_half_pairs(where, line)
        raise BadValue(f"{where}: not JSON ({fault}); expected one JSON object a line") from fault
    return as_object(where, value)


def as_object(where: str, value: Any) -> dict[str, Any]:
    """A JSON value that is an object of whole characters. Raises BadValue, beginning with `where`."""
    if not isinstance(value, dict):
        raise BadValue(f"{where}: holds a {type(value).__name__}; expected a JSON object")
    refuse_half_pairs(where, value)
    return value


def shown(value: object) -> str:
    """A value as a message shows it: on one line, cut short."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."  # noqa: PLR2004 # as much as the line has room for


def keys_of(record: dict[str, Any]) -> str:
    """The keys of a record as a message lists them: the first eight, each cut short."""
    return ", ".join(key if len(key) <= 40 else f"{key[:37]}..." for key in sorted(record)[:8]) or "no keys"  # noqa: PLR2004 # as above


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
