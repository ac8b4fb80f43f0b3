"""The standard streams made safe: text that cannot be encoded is replaced, and closed streams take no other file."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from mwtool.errors import OutputError


class _Closed(io.TextIOBase):
    """Stands in for a standard output that was closed before the command began."""

    def write(self, _: str) -> int:
        """Raise OutputError: nothing can be shown."""
        raise OutputError("standard output is closed; redirect it to a file or give -o FILE")

    def writable(self) -> bool:
        """It is there to be written to."""
        return True


def prepare() -> None:
    """Make stdin, stdout and stderr usable whatever they are. Called once, before anything is opened.

    A descriptor from 0 to 2 that is closed is pointed at the null device: the next file opened would take its number,
    and what libraries print would end up in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")


def give_up_stdout() -> None:
    """Drop what could not be written, or Python tries once more at exit and complains again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
