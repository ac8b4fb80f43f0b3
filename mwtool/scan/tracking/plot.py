"""Massive weights over training as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import (
    BLUE,
    GREEN,
    INK,
    VERMILION,
    count_axis,
    document_of,
    model_name,
    panels,
    plain_numbers,
    styled,
)
from mwtool.scan.tracking.document import SCHEMA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHTS = (1.35, 1.2, 1.2, 1.5)
"""Of the panels, in inches."""
SEVERAL = 2
"""Checkpoints from which on there is a curve."""


def plot_track(track: Mapping[str, Any]) -> Figure:
    """How massive activations emerge over training, from the document of `mwtool track`.

    The panels, over the training steps (over the checkpoints where these name no steps): largest and median |h| of bos
    before the last layer; largest |z|; kurtosis of h; and the largest |h| of every layer. Filled markers are
    checkpoints with a massive layer by the definitions. Raises BadValue for another document.
    """
    document = document_of(track, SCHEMA)
    points = document["checkpoints"]
    steps = [one["step"] for one in points]
    stepped = None not in steps and len(set(steps)) == len(steps)
    at = steps if stepped else list(range(len(points)))
    curves = (
        ("Residual stream", "largest |h|", BLUE, [abs(one["hidden"]["value"]) for one in points]),
        ("Intermediate state", "largest |z|", VERMILION, [abs(one["intermediate"]["value"]) for one in points]),
        ("Kurtosis of the residual stream", "kurtosis", GREEN, [one["kurtosis"] for one in points]),
    )
    with styled():
        figure, axes = panels(HEIGHTS, _caption(document))
        for panel, (title, label, color, values) in zip(axes, curves, strict=False):
            panel.plot(at, values, "-", color=color)
            for face, massive in ((color, True), ("white", False)):
                marked = [n for n, one in enumerate(points) if (one["massive"] is not None) == massive]
                panel.plot([at[n] for n in marked], [values[n] for n in marked], "o", color=color, markerfacecolor=face)
            panel.set_yscale("log", nonpositive="mask")
            panel.set(title=title, ylabel=label)
            plain_numbers(panel)
        axes[0].plot(at, [one["median"] for one in points], "--", color=INK, label="median |h| there")
        axes[0].legend()
        _depth(figure, axes[3], document, at)
        for panel in axes:
            panel.set_xlim(*_limits(at))
            count_axis(panel)
        for panel in axes[:-1]:
            panel.tick_params(labelbottom=False)
        axes[-1].set(xlabel="training step" if stepped else "checkpoint (in the order given, from 0)")
    return figure


def _limits(at: Sequence[int]) -> tuple[float, float]:
    edges = _edges(at)
    return edges[0], edges[-1]


def _edges(at: Sequence[int]) -> list[float]:
    """Borders between neighbours, half-way, so that each checkpoint has a column of its own."""
    if len(at) < SEVERAL:
        return [at[0] - 0.5, at[0] + 0.5]
    between = [(a + b) / 2 for a, b in pairwise(at)]
    return [at[0] - (between[0] - at[0]), *between, at[-1] + (at[-1] - between[-1])]


def _depth(figure: Figure, panel: Axes, document: Mapping[str, Any], at: Sequence[int]) -> None:
    """A heat map of the largest |h| of every layer, on a log scale."""
    import numpy as np
    from matplotlib.colors import LogNorm

    table = np.array([[layer["hidden"] for layer in one["layers"]] for one in document["checkpoints"]]).T
    largest = float(table.max()) or 1.0
    smallest = max(float(table.min()), largest * 1e-6)
    norm = LogNorm(vmin=min(smallest, largest * 0.9), vmax=largest, clip=True)
    order = sorted(range(len(at)), key=lambda n: at[n])
    edges = _edges([at[n] for n in order])
    image = panel.pcolormesh(edges, np.arange(table.shape[0] + 1) - 0.5, table[:, order], cmap="cividis", norm=norm)
    panel.grid(visible=False)
    panel.set(title="Largest |h| of each layer", ylabel="layer (from 0)")
    bar = figure.colorbar(image, ax=panel, location="bottom", aspect=40, pad=0.02)
    powers = [10.0**power for power in range(-9, 9) if smallest <= 10.0**power <= largest]
    bar.set_ticks(powers)
    bar.ax.minorticks_off()
    bar.ax.xaxis.set_major_formatter(lambda value, _at: f"{value:,.6g}")


def _caption(document: Mapping[str, Any]) -> str:
    points = document["checkpoints"]
    first = next((one for one in points if one["massive"] is not None), None)
    said = (
        f"{model_name(document)}, {len(points)} checkpoints ({document['dtype']}), bos alone, layers before the last."
    )
    limits = document["settings"]
    rule = f"|h| above {limits['magnitude']:g} and {limits['ratio']:g} times the median"
    if first is None:
        return f"{said} None has a massive layer ({rule})."
    where = f"step {first['step']:,}" if first["step"] is not None else first["name"]
    return f"{said} Filled: with a massive layer ({rule}), first at {where} (layer {first['massive']['layer']})."
