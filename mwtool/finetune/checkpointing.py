"""Which checkpoints of a run are whole, and whether they belong to the run that wants to go on from them.

Trainer writes a checkpoint file by file. The mark is written last and lists the files with their sizes, so that a
folder a killed process left half-written is told from a whole one. It also holds the settings.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue

MARK = "mwtool_checkpoint.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint. settings: of the run that made it; history: p of every step until then, by step."""

    folder: Path
    step: int
    settings: dict[str, Any]
    history: dict[int, float]


def mark(folder: Path, settings: Mapping[str, Any], history: Mapping[int, float]) -> None:
    """Say of a checkpoint whose files are all there that it is whole."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MARK}
    said = {"files": files, "settings": dict(settings), "history": {str(t): p for t, p in history.items()}}
    temporary = folder / f".{MARK}"
    temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MARK)


def newest(run: Path, settings: Mapping[str, Any]) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The whole checkpoint of the highest step, and what to say of those passed over; None where there is none.

    Raises BadValue if it was made with other settings, naming the first that differs.
    """
    notes = []
    for folder in _folders(run):
        found = _read(folder)
        if found is None:
            notes.append(f"{folder} is half-written and passed over")
            continue
        _refuse_other(found, settings)
        return found, tuple(notes)
    return None, tuple(notes)


def clear(run: Path, after: int) -> None:
    """Remove what was left half-written: checkpoints of later steps than the one gone on from."""
    for folder in _folders(run):
        if _step(folder) > after:
            shutil.rmtree(folder)


def _folders(run: Path) -> list[Path]:
    found = [folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _read(folder: Path) -> Checkpoint | None:
    try:
        said = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in said["files"].items()):
            return None
        history = {int(t): float(p) for t, p in said["history"].items()}
        return Checkpoint(folder, _step(folder), dict(said["settings"]), history)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _refuse_other(found: Checkpoint, settings: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(settings))
    for name, value, other in _differences(found.settings, ours):
        raise BadValue(
            f"{found.folder} was made with {name} {_shown(value)}, and {name} is now {_shown(other)}: go on with what "
            f"it was made with, or train into another folder (-o)"
        )


def _differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 # a message is one line
