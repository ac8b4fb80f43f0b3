"""Figures of what a scan found in whole texts: states by position, attention, sink rates; and how bos is routed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadValue
from mwtool.files.figure import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    VERMILION,
    count_axis,
    document_of,
    model_name,
    panels,
    sheet,
    styled,
)
from mwtool.massive import SCHEMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mwtool.scan.scanner import Scan

WHERE = {"start": "bos first", "middle": "bos in the middle", "end": "bos last", "absent": "no bos"}
COLORS = "cividis"
"""From dark to light: the same order in grey, and for the colour-blind."""
STATES = (("hidden", "|h|", "hidden_size"), ("intermediate", "|z|", "intermediate_size"))
SHORTEST = 0.085
"""Inches for the name of a token."""


def figures_of(scan: Scan | Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every figure of this module that a scan has something for, with a short name."""
    document = document_of(scan, SCHEMA)
    placements = (document.get("positions") or {}).get("placements") or []
    if placements:
        yield "positions", plot_positions(document)
        yield "surface", plot_positions(document, surface=True)
    if any(one["maps"] for one in placements):
        yield "attention", plot_attention(document)
    if document.get("sinks"):
        yield "sinks", plot_sinks(document)
    if document.get("routing"):
        yield "router", plot_router(document)


def plot_positions(scan: Scan | Mapping[str, Any], *, surface: bool = False) -> Figure:
    """Magnitudes over position and dimension (Figure 2 and Appendix C of the paper), one line of panels a place of bos.

    scan: a `Scan` made with `Texts(positions=...)`, or its document. The left panels show the residual stream after
    the massive layer, the middle ones the intermediate state in it: for each position the largest magnitude in each
    of 32 parts of the dimensions. The right ones show the attention each position receives in later layers.
    surface: draw the two states as surfaces, on a linear axis. Raises BadValue for a document without positions.
    """
    document = document_of(scan, SCHEMA)
    found = _part(document, "positions", "--positions TEXT")
    placements = found["placements"]
    with styled():
        if surface:
            figure = sheet(1.5 * len(placements), _positions_caption(document, surface=True))
            _surfaces(figure, document)
            return figure
        heights = [0.35 + SHORTEST * len(one["ids"]) for one in placements]
        figure = sheet(sum(heights) + 0.75, _positions_caption(document, surface=False))
        axes = figure.subplots(
            len(placements), 3, squeeze=False, height_ratios=heights, width_ratios=(1, 1, 0.55), sharex="col"
        )
        _maps(figure, axes, document)
        for row, one in zip(axes, placements, strict=True):
            row[0].set_title(WHERE[one["where"]], fontsize=7, pad=3)
            _tokens(row[0], one["tokens"])
            _received(row[2], one)
        for panel, label in zip(axes[-1], ("dimension", "row", "attention"), strict=True):
            panel.set_xlabel(label, fontsize=7)
    return figure


def plot_attention(scan: Scan | Mapping[str, Any]) -> Figure:
    """Attention maps around the massive layer (Appendix E of the paper): the mean over the heads of each layer.

    scan: a `Scan` made with `Texts(positions=..., attention=True)`, or its document. Of the places of bos the first
    one is shown, which is at the start where there is a bos. Raises BadValue for a document without maps.
    """
    import numpy as np

    document = document_of(scan, SCHEMA)
    found = _part(document, "positions", "--positions TEXT --attention")
    one = found["placements"][0]
    if not one["maps"]:
        raise BadValue("the scan kept no attention maps; make it with --positions TEXT --attention")
    said = f"{_opening(document)} Attention weights, query by key, mean over heads; {WHERE[one['where']]}."
    said += _band(document).replace("Band: the massive layer,", "Massive layer:")
    with styled():
        figure = sheet(max(1.4, 0.6 + SHORTEST * len(one["ids"])), said)
        axes = figure.subplots(1, len(one["maps"]), squeeze=False, sharey=True)[0]
        for panel, shown in zip(axes, one["maps"], strict=True):
            size = len(shown["weights"])
            weights = np.full((size, size), np.nan)
            for at, line in enumerate(shown["weights"]):
                weights[at, : len(line)] = line
            image = panel.imshow(weights, cmap=COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.grid(visible=False)
            panel.set(title=f"layer {shown['layer']}", xlabel="key position")
            panel.tick_params(axis="y", length=0)
            count_axis(panel)
        _tokens(axes[0], one["tokens"])
        figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02)
    return figure


def plot_sinks(scan: Scan | Mapping[str, Any]) -> Figure:
    """The sink rate of each layer, and below it each head's score: mean attention to the first token (Appendix E).

    scan: a `Scan` made with `Texts(sinks=...)`, or its document. The band is the massive layer. Raises BadValue for a
    document without sink rates.
    """
    import numpy as np

    document = document_of(scan, SCHEMA)
    found = _part(document, "sinks", "--sinks")
    at = [one["layer"] for one in found["layers"]]
    scores = np.full((max(len(one["scores"]) for one in found["layers"]), max(at) + 1), np.nan)
    for one in found["layers"]:
        scores[: len(one["scores"]), one["layer"]] = one["scores"]
    said = (
        f"{_opening(document)} Sink: a head whose queries pay the first of {found['length']} tokens more than "
        f"{found['eps']:g} of their attention on average; {found['windows']} windows. Model: {found['rate']:.1%}."
    )
    with styled():
        figure, (above, below) = panels((1.4, 0.55 + 0.11 * scores.shape[0]), said + _band(document))
        above.plot(at, [one["rate"] for one in found["layers"]], "o-", color=BLUE)
        above.set(ylabel="sink rate", ylim=(-0.03, 1.03), title="Heads that are attention sinks")
        image = below.imshow(scores, cmap=COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        below.grid(visible=False)
        below.set(ylabel="head (from 0)", xlabel="decoder layer (from 0)", title="Mean attention to the first token")
        _count_rows(below)
        figure.colorbar(image, ax=below, location="bottom", aspect=40, pad=0.02)
        for panel in (above, below):
            panel.set_xlim(-0.6, scores.shape[1] - 0.4)
            count_axis(panel)
        _mark(above, document)
    return figure


def plot_router(scan: Scan | Mapping[str, Any]) -> Figure:
    """The router's probabilities for bos over the layers of a mixture of experts (Figure 5 of the paper).

    scan: a `Scan` of such a model, or its document. The upper panel shows the three largest, the lower one all
    experts; the band is the massive layer. Raises BadValue for a dense model.
    """
    import numpy as np

    document = document_of(scan, SCHEMA)
    found = document.get("routing")
    if not found:
        raise BadValue("the model that was scanned has no routed experts; a figure of its router needs some")
    at = [one["layer"] for one in found]
    experts = max(len(one["probabilities"]) for one in found)
    table = np.full((experts, max(at) + 1), np.nan)
    for one in found:
        table[: len(one["probabilities"]), one["layer"]] = one["probabilities"]
    ranked = [sorted(one["probabilities"], reverse=True)[:3] for one in found]
    with styled():
        figure, (above, below) = panels(
            (1.5, min(3.0, 0.8 + 0.08 * experts)),
            f"{_opening(document)} Router probabilities for the first token.{_band(document)}",
        )
        series = ((BLUE, "o", "largest"), (VERMILION, "s", "2nd"), (GREEN, "^", "3rd"))
        for (color, marker, label), values in zip(series, zip(*ranked, strict=True), strict=False):
            above.plot(at, values, marker=marker, color=color, label=label)
        above.set(ylabel="probability", ylim=(-0.03, 1.03))
        figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=3)
        image = below.imshow(table, cmap=COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        below.grid(visible=False)
        below.set(ylabel="expert (from 0)", xlabel="decoder layer (from 0)")
        _count_rows(below)
        figure.colorbar(image, ax=below, location="bottom", aspect=40, pad=0.02)
        for panel in (above, below):
            panel.set_xlim(-0.6, table.shape[1] - 0.4)
            count_axis(panel)
        _mark(above, document)
    return figure


def _count_rows(panel: Axes) -> None:
    """Whole numbers on the vertical axis."""
    from matplotlib.ticker import MaxNLocator

    panel.yaxis.set_major_locator(MaxNLocator(integer=True))


def _part(document: Mapping[str, Any], name: str, option: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] | None = document.get(name)
    if found is None:
        raise BadValue(f"the scan has no {name}; make it with {option}")
    return found


def _opening(document: Mapping[str, Any]) -> str:
    return f"{model_name(document)} ({document['dtype']})."


def _band(document: Mapping[str, Any]) -> str:
    return "" if document["massive"] is None else f" Band: the massive layer, {document['massive']['layer']}."


def _mark(panel: Axes, document: Mapping[str, Any]) -> None:
    if document["massive"] is not None:
        at = document["massive"]["layer"]
        panel.axvspan(at - 0.45, at + 0.45, color=ORANGE, alpha=0.3, linewidth=0, zorder=0)


def _positions_caption(document: Mapping[str, Any], *, surface: bool) -> str:
    layer, shape = document["positions"]["layer"], document["shape"]
    parts = len(document["positions"]["placements"][0]["hidden"]["bins"][0])
    said = (
        f"{_opening(document)} Layer {layer}: left, |h| after it (H = {shape['hidden_size']:,}); "
        f"{'right' if surface else 'middle'}, |z| in it (I = {shape['intermediate_size']:,}); the largest magnitude "
        f"in each of {parts} parts of the dimensions."
    )
    return said if surface else f"{said} Right: attention received in the layers after it."


def _maps(figure: Figure, axes: Any, document: Mapping[str, Any]) -> None:
    """The heat maps of both states, each with one scale for all places of bos."""
    import numpy as np
    from matplotlib.colors import LogNorm

    for column, (state, symbol, size) in enumerate(STATES):
        tables = [np.array(one[state]["bins"]) for one in document["positions"]["placements"]]
        width = document["shape"][size]
        largest = max(float(table.max()) for table in tables) or 1.0
        smallest = max(min(float(np.median(table)) for table in tables), largest * 1e-6)
        norm = LogNorm(vmin=min(smallest, largest * 0.9), vmax=largest, clip=True)
        for row, table in zip(axes, tables, strict=True):
            extent = (0, width, table.shape[0] - 0.5, -0.5)
            image = row[column].imshow(
                table, cmap=COLORS, norm=norm, aspect="auto", interpolation="nearest", extent=extent
            )
            row[column].grid(visible=False)
            row[column].set_yticks([])
            row[column].set_xticks([0, width], ["0", f"{width:,}"], fontsize=6)
        bar = figure.colorbar(image, ax=list(axes[:, column]), location="top", aspect=25, pad=0.01)
        bar.set_label(f"magnitude {symbol}", fontsize=7, labelpad=3)
        powers = [10.0**power for power in range(-9, 9) if smallest <= 10.0**power <= largest]
        bar.set_ticks(powers[:: max(1, len(powers) // 3)])
        bar.ax.tick_params(labelsize=6)
        bar.ax.minorticks_off()
        bar.ax.xaxis.set_major_formatter(lambda value, _at: f"{value:,.6g}")


def _tokens(panel: Axes, tokens: Sequence[str]) -> None:
    names = [repr(one)[1:-1].strip() or "\N{OPEN BOX}" for one in tokens]
    shown = [one if len(one) <= 10 else f"{one[:9]}\N{HORIZONTAL ELLIPSIS}" for one in names]  # noqa: PLR2004 - a narrow margin
    panel.set_yticks(range(len(shown)), shown, fontsize=5)
    panel.tick_params(axis="y", length=0, pad=1)


def _received(panel: Axes, one: Mapping[str, Any]) -> None:
    """Bars for the attention each position receives, after the layer shown."""
    values = one["after"] or one["before"]
    panel.grid(visible=False)
    panel.set_yticks([])
    panel.set_xlim(0, 1)
    panel.set_ylim(len(one["ids"]) - 0.5, -0.5)
    if values is not None:
        colors = [VERMILION if at == one["at"] else BLUE for at in range(len(values))]
        panel.barh(range(len(values)), values, color=colors, height=0.75)


def _surfaces(figure: Figure, document: Mapping[str, Any]) -> None:
    import numpy as np

    placements = document["positions"]["placements"]
    axes: Any = figure.subplots(len(placements), 2, squeeze=False, subplot_kw={"projection": "3d"})
    for row, one in zip(axes, placements, strict=True):
        for panel, (state, symbol, size) in zip(row, STATES, strict=True):
            table = np.array(one[state]["bins"])  # (T, parts)
            top = max(max(map(max, each[state]["bins"])) for each in placements) or 1.0
            edges = np.linspace(0, document["shape"][size], table.shape[1])
            across, along = np.meshgrid(edges, np.arange(table.shape[0]))
            if min(table.shape) > 1:
                panel.plot_surface(
                    across, along, table, cmap=COLORS, vmin=0, vmax=top, linewidth=0, rcount=len(table), ccount=99
                )
            else:
                panel.plot(across.flat, along.flat, table.flat, color=BLUE)
            panel.set_title(f"{WHERE[one['where']]}: {symbol}", fontsize=6, pad=-2, loc="left")
            panel.set_xlabel("dimension" if state == "hidden" else "row", fontsize=5, labelpad=-13)
            panel.set_ylabel("position", fontsize=5, labelpad=-13)
            panel.set_zlim(0, top)
            panel.tick_params(labelsize=5, pad=-4, colors=INK)
            for axis, most in ((panel.xaxis, 3), (panel.yaxis, 4), (panel.zaxis, 3)):
                axis.get_major_locator().set_params(nbins=most, integer=axis is panel.yaxis)
            panel.zaxis.set_major_formatter(lambda value, _at: f"{value:,.6g}")
