"""Shared by all plots: the file format, saving, and a matplotlib that never opens a window."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mwtool.errors import OutputError
from mwtool.files.atomic_write import write


def check_plottable(path: Path) -> None:
    """Check, before any work is done, that `path` has a suffix matplotlib can write. Raises OutputError."""
    pyplot = load_pyplot()
    figure = pyplot.figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if _format(path) not in known:
        raise OutputError(
            f"{path}: matplotlib cannot write files of type {path.suffix or '(none)'}; expected one of "
            f"{', '.join(known)}"
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure atomically, in the format of the suffix of `path`, and close it. Raises OutputError."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=_format(path), bbox_inches="tight", dpi=150)
    load_pyplot().close(figure)
    write(path, drawn.getvalue())


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower()


def load_pyplot() -> Any:
    """matplotlib.pyplot with a backend that writes files and opens no window; imported at the first call."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
