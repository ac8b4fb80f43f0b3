"""Checkpoints over training as lines of text, each of which can be printed as soon as it is known."""

from __future__ import annotations

from mwtool.scan.tracking.track import Checkpoint

HEADING = (
    f"{'checkpoint':>16}  layer  {'rows':<18} {'max |z|':>9} {'layer':>5} {'max |h|':>9} {'layer':>5} {'kurtosis':>8}"
)
"""Of the columns of `track_line`."""


def track_line(point: Checkpoint) -> str:
    """The massive layer and its rows, the largest |z| and |h| of bos with their layers, and the largest kurtosis."""
    name = point.stage.name if point.stage.step is None else f"{point.stage.step:,}"
    found = point.massive
    layer, rows = ("-", "-") if found is None else (str(found.layer), ", ".join(map(str, found.rows)))
    rows = rows if len(rows) <= 18 else f"{rows[:15]}..."  # noqa: PLR2004 - the width of the column
    name = name if len(name) <= 16 else f"...{name[-13:]}"  # noqa: PLR2004 - likewise; paths differ where they end
    z, h = point.intermediate, point.hidden
    sizes = f"{_short(z.value):>9} {z.layer:>5} {_short(h.value):>9} {h.layer:>5} {point.kurtosis:>8.1f}"
    return f"{name:>16}  {layer:>5}  {rows:<18} {sizes}"


def _short(value: float) -> str:
    size = abs(value)
    return f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"  # noqa: PLR2004 - four digits are enough
