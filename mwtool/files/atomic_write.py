"""Atomic writes: files and folders are written whole or not at all, and can be checked to be writable beforehand."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from filelock import lock_descriptor

from mwtool.errors import OutputError

INCOMPLETE = ".incomplete"
WINDOWS = os.name == "nt"
"""Where a file that is open can be neither renamed nor removed, and a folder cannot be opened."""


def check_writable(path: Path) -> None:
    """Check, before any work is done, that a result can be written to `path`. Raises OutputError."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected a file name")
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist; create it, or write elsewhere")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path} is not writable; change its permissions, or write elsewhere")


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically: under a temporary name beside it, which is then renamed.

    Temporary files left by killed processes are removed. Pipes and devices are written to directly.
    Raises OutputError if the file cannot be written.
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
        raise OutputError(f"{path} could not be written: {fault.strerror or fault}; no partial file is left") from fault
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _temporary(target: Path) -> tuple[int, str]:
    """A new file beside `target`, opened and locked: its handle and its name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=INCOMPLETE, dir=target.parent)
        with suppress(OSError):  # a file system without locks, where nothing is cleared either
            lock_descriptor(handle)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # cleared by another process before it was locked


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}."  # a file name may take 255 bytes, the temporary one included


def _clear(target: Path) -> None:
    """Remove temporary files that killed processes left beside `target`: those nobody has locked."""
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


def permissions(folder: Path) -> None:
    """Give all files and folders in a folder the permissions of new files, as the umask determines them.

    Libraries that write to a temporary file and rename it leave a file that only its owner can read.
    """
    mask = _umask()
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_free(folder: Path, besides: Collection[str] = ()) -> None:
    """Check, before any work is done, that `folder` can be created, or is empty. Raises OutputError.

    besides: names of files that it may contain.
    """
    if folder.exists() and (not folder.is_dir() or any(path.name not in besides for path in folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; save elsewhere")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent} does not exist; create it, or save elsewhere")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{folder} is not writable; change its permissions, or save elsewhere")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends, and removed if the block raises.

    A killed process leaves the temporary folder behind; the next process to write `folder` removes it.
    Raises OutputError if the folder cannot be written.
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
        permissions(temporary)
        for file in (*temporary.rglob("*"), temporary):  # flushed to disk before it gets its final name
            _sync(file)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _claimed(temporary: Path) -> Iterator[None]:
    """Create the folder, empty, and keep other processes from writing to it with a lock file beside it.

    Raises OutputError if another process is writing to it.
    """
    lock = temporary.with_name(f"{temporary.name}.lock")
    handle = hold(lock)
    if handle is None:
        raise OutputError(f"{temporary} is being written by another process; wait for it, or save elsewhere")
    try:
        temporary.mkdir(exist_ok=True)
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        let_go(lock, handle)


def hold(path: Path) -> int | None:
    """Take a lock file, which is made if need be: its open handle, or None if another process holds it.

    The file may be removed while it is held: whoever locks a file that has no name any more tries again.
    Raises OSError where it cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:  # a file system without locks: assume that no other process writes here
            return handle
        if free and os.fstat(handle).st_nlink:
            return handle
        os.close(handle)
        if not free:
            return None


def let_go(path: Path, handle: int) -> None:
    """Remove a lock file and release it."""
    if not WINDOWS:
        with suppress(OSError):
            path.unlink()  # while the lock is held, so that a waiting process sees that the file is gone
    os.close(handle)
    if WINDOWS:
        with suppress(OSError):  # another process has taken it already
            path.unlink()


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
        raise OutputError(f"{folder} could not be written: {reason}; no partial folder is left") from fault
