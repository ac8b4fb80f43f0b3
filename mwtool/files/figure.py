"""Results as figures, with matplotlib. Knows results only; computes nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mwtool.errors import OutputError
from mwtool.files.atomic_write import write


def check_plottable(path: Path) -> None:
    """Raise before the work begins if no figure could be written to `path` after it."""
    pyplot = load_pyplot()
    figure = pyplot.figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if _format(path) not in known:
        raise OutputError(f"{path}: no figure of type {path.suffix or '(none)'}; expected one of {', '.join(known)}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure in the format of its suffix, whole or not at all, and close it; raises OutputError."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=_format(path), bbox_inches="tight", dpi=150)
    load_pyplot().close(figure)
    write(path, drawn.getvalue())


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower()


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing into files and never into a window; imported when the first figure is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")  # a file, never a window
    from matplotlib import pyplot as plt

    return plt
