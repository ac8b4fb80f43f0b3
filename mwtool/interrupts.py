"""Restore weights to the end although Ctrl-C arrives, once or several times."""

from __future__ import annotations

from collections.abc import Callable


def uninterrupted(restore: Callable[[], None]) -> None:
    """Run to its end; each Ctrl-C that comes in the meantime starts it over, and the last is raised after it."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as again:
            interrupted = again
    if interrupted is not None:
        raise interrupted
