"""Shared by all figures: one style, the size of a column, a caption, and saving.

Figures are built on `matplotlib.figure.Figure` itself, without pyplot: no window opens, no global state changes, and
nothing has to be closed. They are drawn from JSON documents, so that a saved result has the figure of a fresh one.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mwtool.errors import BadValue, OutputError
from mwtool.files.atomic_write import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.5
"""Width of a figure in inches: one column of a two-column page (89 mm), and of a narrow screen."""
INK, MUTED, LINE, PAPER = "#24292f", "#6e7781", "#d0d7de", "#ffffff"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#b35a92", "#56b4e9", "#e69f00"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Okabe and Ito's colours, which remain distinct under the common kinds of colour blindness; purple is darkened."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""One for each colour, so that series also differ in grey."""
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same figure on every machine
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.4,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a file's name begins no formula
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "errorbar.capsize": 2,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "mwtool",  # the same document gives the same file
    "pdf.fonttype": 42,  # text that can be searched and edited
}
CAPTION, LEADING = 70, 0.13
"""Characters in a line of a caption at the width of a column, and inches from line to line."""
TITLE = 32
"""Characters in a line of a title above bars, whose names are to the left of it."""
NARROW = 50
"""A logarithmic axis from 1 to less than this has ticks at 1, 2, 5 and 10 times powers of ten."""
CAPTIONED = "caption"
"""Name of a caption among the texts of a figure."""


class HasDocument(Protocol):
    """A result that can be drawn: a scan, an ablation, evaluations."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the result."""
        ...


def document_of(result: HasDocument | Mapping[str, Any], *schemas: str) -> Mapping[str, Any]:
    """The document to draw. Raises BadValue where it has none of these schemas."""
    document = result if isinstance(result, Mapping) else result.to_dict()
    if document.get("schema") not in schemas:
        raise BadValue(
            f"a document of schema {document.get('schema')!r} was given; expected {' or '.join(map(repr, schemas))}"
        )
    return document


def panels(heights: Sequence[float], caption: str) -> tuple[Figure, list[Axes]]:
    """A figure one column wide with panels one below the other, and its caption below them.

    heights: of each panel, in inches. Use it inside `styled`, which all that is drawn needs as well.
    """
    figure = sheet(sum(heights), caption)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))
    return figure, [row[0] for row in axes]


def sheet(height: float, caption: str) -> Figure:
    """An empty figure one column wide with a caption at its foot, for other arrangements than `panels`.

    height: of what is drawn above the caption, in inches. Use it inside `styled`.
    """
    from matplotlib.figure import Figure

    lines = textwrap.wrap(caption, CAPTION, break_on_hyphens=False)
    figure = Figure(figsize=(COLUMN, height + LEADING * len(lines) + 0.1), layout="constrained")
    text = figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=6.5, color=MUTED, linespacing=1.3)
    text.set_gid(CAPTIONED)
    return figure


def without_caption(figure: Figure) -> str:
    """Take the caption off a figure, for a page that shows it as text of its own, and return it."""
    found = next((text for text in figure.texts if text.get_gid() == CAPTIONED), None)
    if found is None:
        return ""
    lines = found.get_text().split("\n")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height - LEADING * len(lines))
    found.set_text("")
    return " ".join(lines)


def styled() -> Any:
    """A context in which matplotlib draws in the style of this module."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def model_name(document: Mapping[str, Any]) -> str:
    """The model as a caption names it: a Hub id whole, a folder or file by its last part."""
    name = local_name(str(document["model"]))
    return name + (f" at {document['revision'][:12]}" if document.get("revision") else "")


def local_name(name: str) -> str:
    """A Hub id whole, the path of a folder or file by its last part."""
    if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1:
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name
    return name


def title_of(words: str) -> str:
    """A title in lines that end before the figure does."""
    return "\n".join(textwrap.wrap(words, TITLE, break_on_hyphens=False))


def fitting(name: str, most: int) -> str:
    """A name of at most so many characters: of a longer one, its beginning and its end."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def count_axis(panel: Axes) -> None:
    """Whole numbers on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_numbers(panel: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Numbers without powers of ten, and on a logarithmic axis of less than two decades more than powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    along = panel.xaxis if axis == "x" else panel.yaxis
    low, high = panel.get_xlim() if axis == "x" else panel.get_ylim()
    if along.get_scale() == "log" and high < NARROW * low:
        along.set_major_locator(LogLocator(subs=(1, 2, 5)))
    along.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:,.6g}"))
    along.set_minor_formatter(NullFormatter())


def check_plottable(path: Path) -> None:
    """Check, before any work is done, that `path` has a suffix matplotlib can write. Raises OutputError."""
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if _format(path) not in known:
        raise OutputError(
            f"{path}: matplotlib cannot write files of type {path.suffix or '(none)'}; expected one of "
            f"{', '.join(known)}"
        )


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the suffix of `path`. Raises OutputError."""
    drawn = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(_format(path))
    with styled():
        figure.savefig(drawn, format=_format(path), dpi=300, metadata=undated)
    content = drawn.getvalue()
    write(path, with_stable_ids(content.decode()) if _format(path) == "svg" else content)


def with_stable_ids(svg: str) -> str:
    """SVG by matplotlib with its generated ids numbered in order of appearance.

    matplotlib names clip paths by a hash of their coordinates, whose last bits differ from drawing to drawing.
    """
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"{found[1]}{len(numbers)}")

    return re.sub(r"\b([a-z])[0-9a-f]{10}\b", numbered, svg)


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower()
