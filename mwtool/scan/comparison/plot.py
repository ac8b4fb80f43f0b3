"""Two scans side by side as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import (
    BLUE,
    PAPER,
    VERMILION,
    count_axis,
    document_of,
    fitting,
    local_name,
    panels,
    plain_numbers,
    styled,
)
from mwtool.scan.comparison.document import SCHEMA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mwtool.scan.comparison.compare import Comparison

MOST = 3
"""Massive dimensions that are drawn, those of the largest magnitudes."""
LONGEST = 26
"""Characters of a model's name in the legend; the caption has all of them."""


def plot_comparison(comparison: Comparison | Mapping[str, Any]) -> Figure:
    """|h| at the massive dimensions of two scans over the layers, one panel a dimension.

    comparison: what `compare_scans` gives, or its document. Models of different shapes, or without a massive dimension,
    have one empty panel that says so. Raises BadValue for another document.
    """
    document = document_of(comparison, SCHEMA)
    traces = sorted(document["dimensions"], key=_largest, reverse=True)[:MOST] if document["same_shape"] else []
    with styled():
        figure, axes = panels([1.5] * max(1, len(traces)), _caption(document))
        for panel, trace in zip(axes, traces, strict=False):
            for side, line, color, size in (("a", "o-", BLUE, 6), ("b", "s--", VERMILION, 2)):
                values = trace[f"values_{side}"]
                if values:
                    name = fitting(local_name(document[side]["name"]), LONGEST)
                    sizes = [abs(value) for value in values]
                    panel.plot(
                        range(len(sizes)),
                        sizes,
                        line,
                        color=color,
                        markersize=size,
                        markerfacecolor=PAPER if side == "a" else color,  # where both are equal, A is around B
                        label=f"{side.upper()}: {name}",
                    )
            panel.set_yscale("log", nonpositive="mask")
            panel.set(title=f"Residual stream, dimension {trace['dimension']}", ylabel="magnitude |h|")
            count_axis(panel)
            plain_numbers(panel)
        if traces:
            axes[-1].set(xlabel="decoder layer (from 0)")
            shown = {
                name: line for panel in axes for line, name in zip(*panel.get_legend_handles_labels(), strict=True)
            }
            figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=1)
        else:
            axes[0].set_axis_off()
            why = "no massive dimension" if document["same_shape"] else "models of different shapes"
            axes[0].text(0, 0.5, f"Nothing to draw: {why}.")
    return figure


def _largest(trace: Mapping[str, Any]) -> float:
    return max(abs(float(value)) for side in "ab" for value in trace[f"values_{side}"] or (0.0,))


def _caption(document: Mapping[str, Any]) -> str:
    sides = "; ".join(
        f"{side.upper()}: {local_name(document[side]['name'])} ({document[side]['dtype']}), massive layer "
        f"{'none' if document[side]['layer'] is None else document[side]['layer']}"
        for side in "ab"
    )
    return f"{sides}. The first token alone."
