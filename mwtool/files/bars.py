"""Horizontal bars with intervals, shared by figures: a group of bars a row, a colour and a hatch a series."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import INK, MUTED, PALETTE, PAPER, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HATCHES = ("", "//////", "||||||", "\\\\\\\\\\\\", "xxxxxx", "------")
"""One for each colour, so that series also differ in grey. Of lines: each dot of a dotted one is a path of its own."""
THICK, LINE, GAP = 0.16, 0.11, 0.11
"""Inches that a bar takes, a line of a row's name, and the space between two rows."""
NAME = 25
"""Characters in a line of a row's name."""
DECADE = 10
"""Largest value over smallest from which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar. value: None where it is not finite. label: what is written behind it."""

    value: float | None
    low: float | None
    high: float | None
    label: str


def height_of(rows: Sequence[str], series: int) -> float:
    """The height in inches of a panel with these rows, its title and axis included."""
    return len(rows) * _pitch(rows, series) + 0.55


def _pitch(rows: Sequence[str], series: int) -> float:
    """Inches from row to row: room for the bars, and for the longest name."""
    return max(series * THICK, LINE * max((len(_wrapped(row)) for row in rows), default=1)) + GAP


def _wrapped(row: str) -> list[str]:
    return textwrap.wrap(row, NAME, break_on_hyphens=False)


def style_of(at: int) -> dict[str, Any]:
    """How the bars of a series are filled."""
    hatch = HATCHES[at % len(HATCHES)]
    return {"facecolor": PALETTE[at % len(PALETTE)], "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}


def draw_bars(
    panel: Axes,
    rows: Sequence[str],
    series: Mapping[str, Mapping[str, Bar]],
    *,
    base: float = 0,
    logarithmic: bool = False,
    styles: Mapping[str, int] | None = None,
) -> None:
    """Bars from `base`, with intervals as lines and values behind them.

    rows: their names, from the top. series: by name, the bars by row; a row may be missing. styles: the number of each
    series among all that the figure has, where this panel lacks some.
    """
    from matplotlib.ticker import MaxNLocator

    pitch = THICK / _pitch(rows, len(series))
    for at, (name, bars) in enumerate(series.items()):
        shift = (at - (len(series) - 1) / 2) * pitch
        places = [row + shift for row, key in enumerate(rows) if key in bars]
        drawn = [bars[key] for key in rows if key in bars]
        lengths = [0.0 if bar.value is None else bar.value - base for bar in drawn]
        number = at if styles is None else styles[name]
        panel.barh(places, lengths, height=0.86 * pitch, left=base, label=name, **style_of(number))
        for place, bar in zip(places, drawn, strict=True):
            _interval(panel, place, bar)
            _label(panel, place, bar, base)
    panel.axvline(base, color=MUTED, linewidth=0.8)
    panel.set_yticks(range(len(rows)), ["\n".join(_wrapped(row)) for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    panel.grid(visible=True, axis="x")
    if logarithmic:
        panel.set_xscale("log")
    _room(panel, [bar for bars in series.values() for bar in bars.values()], base, logarithmic=logarithmic)
    if not logarithmic:
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    plain_numbers(panel, "x")


def spread(values: Sequence[float]) -> bool:
    """Whether positive values are so far apart that they need a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) > DECADE * min(values)


def _interval(panel: Axes, place: float, bar: Bar) -> None:
    if bar.value is None or bar.low is None or bar.high is None:
        return
    if math.isfinite(bar.low) and math.isfinite(bar.high):
        panel.plot([bar.low, bar.high], [place, place], color=PAPER, linewidth=1.9, solid_capstyle="butt")
        panel.plot([bar.low, bar.high], [place, place], "|-", color=INK, linewidth=0.9, markersize=3.5)


def _label(panel: Axes, place: float, bar: Bar, base: float) -> None:
    """The value, behind the end of bar and interval that is farther from the base."""
    value = base if bar.value is None else bar.value
    left = value < base
    ends = [value, *(end for end in (bar.low, bar.high) if end is not None and math.isfinite(end))]
    panel.annotate(
        bar.label,
        (min(ends) if left else max(ends), place),
        xytext=(-3 if left else 3, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=6.5,
    )


def _room(panel: Axes, bars: Sequence[Bar], base: float, *, logarithmic: bool) -> None:
    """Room for the labels on the sides where there are bars."""
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high) if end is not None and math.isfinite(end)]
    low, high = min([base, *ends]), max([base, *ends])
    longest = max((len(bar.label) for bar in bars), default=0)
    share = 0.033 * longest + 0.05
    if logarithmic:
        factor = (high / low) ** share
        panel.set_xlim(low / (factor if low < base else 1), high * factor)
    else:
        width = (high - low) or 1.0
        panel.set_xlim(low - (share * width if low < base else 0), high + share * width)
