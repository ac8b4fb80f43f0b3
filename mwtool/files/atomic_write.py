"""Files and folders written whole or not at all, and whether they can be, before the work whose results they hold."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from filelock import lock_descriptor

from mwtool.errors import OutputError

INCOMPLETE = ".incomplete"
WINDOWS = os.name == "nt"
"""Where a file that is open can be neither renamed nor removed, and a folder cannot be opened."""


def check_writable(path: Path) -> None:
    """Raise OutputError before the work begins if its result could not be written to `path` after it."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected a file name")
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist; make it, or write elsewhere")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path} cannot be written: no permission")


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: under a temporary name beside it, then moved into place.

    What a killed process left under such a name is removed. Pipes and devices are written to directly.
    Raises OutputError.
    """
    temporary: str | None = None
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays a link; what it points to is replaced
        _clear(target)
        handle, temporary = _temporary(target)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
            if not WINDOWS:
                Path(temporary).replace(target)  # while the lock is held
        if WINDOWS:
            Path(temporary).replace(target)
        temporary = None
    except OSError as fault:
        raise OutputError(f"{path} cannot be written: {fault.strerror or fault}; nothing was left there") from fault
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _temporary(target: Path) -> tuple[int, str]:
    """A new file beside `target`, open and locked, and its name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=INCOMPLETE, dir=target.parent)
        with suppress(OSError):  # a file system without locks: nothing is cleared there either
            lock_descriptor(handle)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # cleared by another process before it was locked


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}."  # a name may take 255 bytes, and so may the temporary one


def _clear(target: Path) -> None:
    """Remove what killed processes left beside `target`: nobody holds it."""
    for left in target.parent.glob(f"{escape(_prefix(target))}*{INCOMPLETE}"):
        with suppress(OSError):
            with left.open("rb+") as file:
                abandoned = lock_descriptor(file.fileno(), blocking=False)
                if abandoned and not WINDOWS:
                    left.unlink()
            if abandoned and WINDOWS:
                left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_free(folder: Path) -> None:
    """Raise OutputError before the work begins if `folder` could not be written after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; save elsewhere")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent} does not exist; make it, or save elsewhere")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{folder} cannot be written: no permission")


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, moved there when the block ends well, removed when it does not.

    A killed process leaves it under its temporary name; the next one clears it away. Raises OutputError.
    """
    with _one_line(folder), _made(folder) as temporary:
        yield temporary


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    target = folder.absolute()
    temporary = target.with_name(f".{target.name}{INCOMPLETE}")
    with _claimed(temporary):
        yield from _filled(temporary, target)


def _filled(temporary: Path, target: Path) -> Iterator[Path]:
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):  # on the disk before it has its name
            _sync(file)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _claimed(temporary: Path) -> Iterator[None]:
    """Make the folder, empty; no other process can fill it until the block ends. A lock file beside it says so.

    Raises OutputError where another process is filling it.
    """
    lock = temporary.with_name(f"{temporary.name}.lock")
    handle = _locked(lock)
    if handle is None:
        raise OutputError(f"{temporary} is being filled by another process; wait for it, or save elsewhere")
    try:
        temporary.mkdir(exist_ok=True)
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        if not WINDOWS:
            lock.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
        os.close(handle)
        if WINDOWS:
            with suppress(OSError):  # another process has taken it already
                lock.unlink()


def _locked(path: Path) -> int | None:
    """An open handle on the lock file, locked; None where another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:  # a file system without locks: nobody else is taken to be at work
            return handle
        if free and os.fstat(handle).st_nlink:
            return handle
        os.close(handle)
        if not free:
            return None


def _sync(path: Path) -> None:
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes what can be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault).partition("\n")[0]
        raise OutputError(f"{folder} cannot be written: {reason}; nothing was left there") from fault
