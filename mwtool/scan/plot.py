"""The scan as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import load_pyplot, save_figure
from mwtool.scan.definitions import median

if TYPE_CHECKING:
    from mwtool.scan.scanner import Scan


def plot_scan(scan: Scan, path: Path) -> None:
    """The three largest entries and the median of each layer's states, and what each FFN adds to the massive dimension.

    Events and the massive layer are marked; without one the third panel is left out. Raises OutputError, and leaves
    no file, where it cannot be written.
    """
    pyplot = load_pyplot()
    panels = 2 if scan.massive is None else 3
    figure, axes = pyplot.subplots(1, panels, figsize=(4.5 * panels, 3.6), squeeze=False, layout="constrained")
    layers = [state.layer for state in scan.states]
    for panel, title, vectors in (
        (axes[0][0], "residual stream", [state.hidden for state in scan.states]),
        (axes[0][1], "intermediate state", [state.intermediate for state in scan.states]),
    ):
        largest = [vector.abs().topk(min(3, len(vector))).values.tolist() for vector in vectors]
        for rank in range(len(largest[0])):
            panel.plot(layers, [top[rank] for top in largest], "o-", markersize=3, label=f"top-{rank + 1}")
        panel.plot(layers, [median(vector) for vector in vectors], "--", color="0.4", label="median")
        panel.set_yscale("log", nonpositive="mask")  # a ReLU's median may be zero
        panel.set(title=title, xlabel="layer", ylabel="magnitude")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize="small", loc="outside right upper")  # beside, it hides none
    if scan.massive is not None:
        dimension = scan.massive.dimension
        axes[0][2].bar(layers, [float(state.added[dimension]) for state in scan.states], color="C3")
        axes[0][2].set(title="written by the FFN", xlabel="layer", ylabel=f"added to dimension {dimension}")
        axes[0][2].set_yscale("symlog", linthresh=1)
        axes[0][2].axhline(0, color="0.6", linewidth=0.8)
    for panel in axes[0]:
        _mark(panel, scan)
    figure.suptitle(f"{scan.identity.model}, {scan.bos.token or scan.bos.id} alone", parse_math=False)
    save_figure(figure, path)


def _mark(panel: Any, scan: Scan) -> None:
    """Layers as whole numbers; behind the curves a band where the massive layer is, and a dotted line at each event."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for event in scan.events:
        panel.axvline(event.layer, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    if scan.massive is not None:
        panel.axvspan(scan.massive.layer - 0.4, scan.massive.layer + 0.4, color="C1", alpha=0.15, zorder=0)
