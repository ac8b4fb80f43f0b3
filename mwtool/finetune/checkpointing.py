"""The folder of a run: which of its checkpoints are complete, whether a run may continue from them, and its lock.

Trainer writes a checkpoint file by file. The mark is written last and lists the files with their sizes and digests, so
that a checkpoint is recognized that a killed process left incomplete, or that was damaged since: a file may be there in
its full length and hold zeros after a power cut. The mark also holds the settings of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue, OutputError
from mwtool.files.atomic_write import hold, let_go, permissions
from mwtool.files.document import text_of
from mwtool.finetune.config import ADDED

MARK = "mwtool_checkpoint.json"
LOCK = ".mwtool.lock"
"""Name of the lock in the folder of a run. It disappears with the run, or stays, unlocked, if that is killed."""
ATTEMPTS = 1000
"""To make a folder and its lock, while other runs that end remove both."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep the folder of a run, which is made if need be, for this process until the block ends.

    Raises OutputError if another run has it, or it cannot be made.
    """
    made, handle = _taken(run)
    try:
        yield
    finally:
        let_go(run / LOCK, handle)
        if made:
            with suppress(OSError):  # not empty, as it should be, or another run has begun in it
                run.rmdir()


def _taken(run: Path) -> tuple[bool, int]:
    """Whether the folder was made, and the handle of its lock. Raises OutputError."""
    made, attempts = False, 0
    while True:
        attempts += 1
        try:
            if not run.exists():
                run.mkdir()
                made = True
            handle = hold(run / LOCK)
        except (OSError, ValueError) as fault:
            gone = isinstance(fault, FileExistsError | FileNotFoundError)  # made or removed by another run meanwhile
            if gone and run.absolute().parent.is_dir() and attempts < ATTEMPTS:
                continue
            if isinstance(fault, FileNotFoundError):
                raise OutputError(f"{run.absolute().parent} does not exist; create it, or save elsewhere") from fault
            reason = getattr(fault, "strerror", None) or fault
            raise OutputError(f"{str(run)!r} cannot be written: {reason}; train into another folder (-o)") from fault
        if handle is None:
            raise OutputError(
                f"{run} is being written by another run; wait until that ends, or train into another folder (-o)"
            )
        return made, handle


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. settings: of the run that made it; history: p of every step until then, by step."""

    folder: Path
    step: int
    settings: dict[str, Any]
    history: dict[int, float]


def mark(folder: Path, settings: Mapping[str, Any], history: Mapping[int, float]) -> None:
    """Mark a checkpoint all of whose files are there as complete, and give them the permissions of any new file.

    safetensors makes its files readable by their owner alone.
    """
    from mwtool.files.schema import checked
    from mwtool.finetune.schema import Mark

    permissions(folder)
    said = {
        "schema": "mwtool.checkpoint/1",
        "files": {
            file.relative_to(folder).as_posix(): _described(file)
            for file in sorted(folder.rglob("*"))  # a sharded state has a folder of its own
            if file.is_file() and file != folder / MARK
        },
        "settings": json.loads(json.dumps(settings)),
        "history": {str(t): p for t, p in sorted(history.items())},
    }
    temporary = folder / f".{MARK}"
    temporary.write_text(text_of(checked(Mark, said)), encoding="utf-8")
    temporary.replace(folder / MARK)


def _described(file: Path) -> dict[str, Any]:
    """The size and the digest of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def newest(run: Path, settings: Mapping[str, Any]) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The complete checkpoint of the highest step, or None, and a note on each incomplete one of a higher step.

    Raises BadValue if it was made with other settings, naming the first that differs.
    """
    notes = []
    for folder in _folders(run):
        found = _read(folder)
        if found is None:
            notes.append(f"{folder} is incomplete or damaged and is not used")
            continue
        _refuse_other(found, settings)
        return found, tuple(notes)
    return None, tuple(notes)


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of the newest complete checkpoint of a run; empty if there is none."""
    for folder in _folders(run):
        found = _read(folder)
        if found is not None:
            return found.settings
    return {}


def date_of(run: Path) -> datetime | None:
    """The day that the chat template wrote into the data of a run, if one did, as its newest checkpoint has it."""
    try:
        return datetime.fromisoformat(settings_of(run)["date"])
    except (KeyError, TypeError, ValueError):
        return None


def clear(run: Path, after: int) -> None:
    """Remove incomplete checkpoints: those of later steps than the one the run continues from."""
    for folder in _folders(run):
        if _step(folder) > after:
            shutil.rmtree(folder)


def _folders(run: Path) -> list[Path]:
    found = [folder for folder in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint; None where its mark is absent or invalid, or a file is not what it was."""
    from mwtool.files.schema import read_document
    from mwtool.finetune.schema import Mark

    try:
        said, found = read_document(folder / MARK, {"mwtool.checkpoint/1": Mark}, "mwtool finetune")
        for name, file in found.files.items():
            path = folder / name
            if path.stat().st_size != file.size or _described(path)["sha256"] != file.sha256:
                return None
    except (BadValue, OSError, ValueError):  # ValueError: a name that no file can have
        return None
    history = {int(t): p for t, p in found.history.items()}
    return Checkpoint(folder, _step(folder), said["settings"], history)


def _refuse_other(found: Checkpoint, settings: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(settings))
    theirs = {**{name: False for name in ADDED if name in ours}, **found.settings}
    for name, value, other in _differences(theirs, ours):
        raise BadValue(
            f"{found.folder} was made with {name} {_shown(value)}, and {name} is now {_shown(other)}: use what it "
            f"was made with, or train into another folder (-o)"
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
