"""The scan as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    VERMILION,
    count_axis,
    document_of,
    model_name,
    panels,
    plain_numbers,
    styled,
)
from mwtool.massive import SCHEMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mwtool.scan.scanner import Scan

HEIGHTS = (1.75, 1.5, 1.4)
"""Of the panels, in inches."""
RANKS = ((BLUE, "o", "largest"), (VERMILION, "s", "2nd"), (GREEN, "^", "3rd"))


def plot_scan(scan: Scan | Mapping[str, Any]) -> Figure:
    """The three largest magnitudes and the median of each layer's states (Figure 3 of the paper), events marked.

    scan: a `Scan`, or the document of one. The panels, over the decoder layers: the residual stream |h|, the
    intermediate state |z|, and |w|, what each FFN adds to the massive dimension, whose sign is the direction of a
    triangle. Dotted lines are events, with an arrow for raising or lowering |h|; the band is the massive layer. Where
    there are no massive dimensions the third panel is left out. Raises BadValue for another document.
    """
    document = document_of(scan, SCHEMA)
    layers = document["layers"]
    trace = _trace(document)
    with styled():
        figure, axes = panels(HEIGHTS[:2] if trace is None else HEIGHTS, _caption(document))
        for panel, state, title, symbol in (
            (axes[0], "hidden", "Residual stream", "|h|"),
            (axes[1], "intermediate", "Intermediate state", "|z|"),
        ):
            _magnitudes(panel, layers, state)
            panel.set_title(title, pad=12 if panel is axes[0] and document["events"] else None)
            panel.set(ylabel=f"magnitude {symbol}")
        if trace is not None:
            _written(axes[2], trace)
        for panel in axes:
            _mark(panel, document)
            panel.set_xlim(-0.6, len(layers) - 0.4)
            count_axis(panel)
            plain_numbers(panel)
        for panel in axes[:-1]:
            panel.tick_params(labelbottom=False)
        axes[-1].set(xlabel="decoder layer (from 0)")
        _directions(axes[0], document)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _magnitudes(panel: Axes, layers: list[dict[str, Any]], state: str) -> None:
    at = [layer["layer"] for layer in layers]
    ranked = [[abs(entry["value"]) for entry in layer[state]["top"]] for layer in layers]
    for (color, marker, label), values in zip(RANKS, zip(*ranked, strict=True), strict=False):
        panel.plot(at, values, marker=marker, color=color, label=label)
    panel.plot(at, [layer[state]["median"] for layer in layers], "--", color=INK, label="median")
    panel.set_yscale("log", nonpositive="mask")  # the median behind a ReLU may be zero


def _written(panel: Axes, trace: dict[str, Any]) -> None:
    """|w| of each layer, with a triangle for its sign; on a log axis, as the states above it."""
    for marker, color, label, positive in (("^", BLUE, "+", True), ("v", VERMILION, "\N{MINUS SIGN}", False)):
        points = [(at, abs(value)) for at, value in enumerate(trace["written"]) if value and (value > 0) == positive]
        if points:
            at, size = zip(*points, strict=True)
            panel.plot(at, size, marker, color=color, markersize=4, label=label)
    panel.set_yscale("log")
    panel.set_title(f"FFN output at dimension {trace['dimension']}")
    panel.set(ylabel="magnitude |w|")
    panel.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.2), handletextpad=0, borderaxespad=0)


def _trace(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The massive dimension over the layers; without a massive layer, that of the first event or the first of all."""
    traces = {one["dimension"]: one for one in document["dimensions"]}
    wanted = [one["dimension"] for one in (document["massive"], *document["events"]) if one is not None]
    found: dict[str, Any] | None = next((traces[one] for one in (*wanted, *traces) if one in traces), None)
    return found


def _mark(panel: Axes, document: Mapping[str, Any]) -> None:
    """Behind the curves a band where the massive layer is, and a dotted line at each event."""
    for event in document["events"]:
        panel.axvline(event["layer"], color=MUTED, linewidth=0.7, linestyle=":", zorder=0)
    if document["massive"] is not None:
        at = document["massive"]["layer"]
        panel.axvspan(at - 0.45, at + 0.45, color=ORANGE, alpha=0.3, linewidth=0, zorder=0)


def _directions(panel: Axes, document: Mapping[str, Any]) -> None:
    """An arrow above each event's line: whether it writes up or down."""
    for event in document["events"]:
        panel.annotate(
            "\N{UPWARDS ARROW}" if event["kind"] == "up" else "\N{DOWNWARDS ARROW}",
            (event["layer"], 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
            color=INK,
            annotation_clip=False,
        )


def _caption(document: Mapping[str, Any]) -> str:
    massive, bos = document["massive"], document["bos"]
    said = f"{model_name(document)} ({document['dtype']}), {bos['token'] or bos['id']} alone."
    if document["events"]:
        said += " Dotted: events, which raise (\N{UPWARDS ARROW}) or lower (\N{DOWNWARDS ARROW}) |h| at a dimension."
    if massive is None:
        return f"{said} No massive layer."
    rows = massive["indices"][: max(1, min(massive["count"], 5))]
    named = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
    expert = "" if massive["expert"] is None else f", expert {massive['expert']}"
    return f"{said} Band: the massive layer, {massive['layer']}{expert} ({named})."
