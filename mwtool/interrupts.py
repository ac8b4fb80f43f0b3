"""Finish restoring weights even if Ctrl-C is pressed, once or several times."""

from __future__ import annotations

from collections.abc import Callable


def uninterrupted(restore: Callable[[], None]) -> None:
    """Call `restore` until it finishes: Ctrl-C in the meantime starts it over.

    Raises KeyboardInterrupt after it has finished, if Ctrl-C was pressed.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as again:
            interrupted = again
    if interrupted is not None:
        raise interrupted
