"""What ends a command that runs out of the memory it is allowed (ulimit -v), in one line.

Libraries tell it in ways of their own: RuntimeError, SystemError, and panics of Rust, which are no Exception.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType


def limit() -> int | None:
    """The bytes of address space this process may use; None where there is no limit, and on Windows."""
    try:
        import resource
    except ImportError:
        return None
    found, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if found == resource.RLIM_INFINITY else found


def told(fault: BaseException) -> str | None:
    """What to say of a failure that no code foresees, where memory is limited; None where it is not."""
    allowed = limit()
    if allowed is None:
        return None
    lines = [*filter(None, map(str.strip, str(fault).splitlines())), type(fault).__name__]
    return (
        f"this failed with {allowed // 1024:,} KiB of memory allowed ({lines[0]}); raise the limit (ulimit -v), or use "
        f"a smaller model"
    )


def watch() -> None:
    """Have what nothing catches told in one line where memory is limited; what libraries lack at exit, not at all."""
    sys.excepthook = _told_or_shown
    if limit() is not None and not os.environ.get("MWTOOL_DEBUG"):
        sys.unraisablehook = _not_shown


def _not_shown(fault: sys.UnraisableHookArgs) -> None:
    """Such as of torch, which imports a library to say how long it compiled."""
    if not isinstance(fault.exc_value, MemoryError):
        sys.__unraisablehook__(fault)


def _told_or_shown(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    line = None if os.environ.get("MWTOOL_DEBUG") or isinstance(fault, KeyboardInterrupt) else told(fault)
    if line is None:
        sys.__excepthook__(kind, fault, trace)
        return
    text = " ".join(line.split())
    os.write(
        2, f"error: {text}\n".encode(errors="backslashreplace")
    )  # what imports nothing needs no memory to speak of
