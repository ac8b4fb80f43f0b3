"""A line on the terminal while libraries are imported, which takes seconds; without a library of its own."""

from __future__ import annotations

import os
import sys

from mwtool.cli import formats

LINE = "loading libraries ..."
_shown = False


def begin() -> None:
    """Show the line where stderr is a terminal that can take it back."""
    global _shown  # noqa: PLW0603 - there is one terminal
    if (
        formats.mode() == "human"
        and sys.stderr.isatty()
        and os.environ.get("TERM") != "dumb"
        and os.environ.get("RANK", "0") == "0"
    ):
        sys.stderr.write(LINE)
        sys.stderr.flush()
        _shown = True


def clear() -> None:
    """Take the line back before anything else is written."""
    global _shown  # noqa: PLW0603 - likewise
    if _shown:
        sys.stderr.write(f"\r{' ' * len(LINE)}\r")
        sys.stderr.flush()
        _shown = False
