"""Results as figures, with matplotlib. Knows results only; computes nothing."""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.analysis import median
from mwtool.errors import OutputError
from mwtool.verdict import named, points_of, ratio_of, short
from mwtool.whole import write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mwtool.ablate import Ablation, Run
    from mwtool.scan import Scan


def check_plottable(path: Path) -> None:
    """Raise before the work begins if no figure could be written to `path` after it."""
    pyplot = _pyplot()
    figure = pyplot.figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if _format(path) not in known:
        raise OutputError(f"{path}: no figure of type {path.suffix or '(none)'}; expected one of {', '.join(known)}")


def plot_scan(scan: Scan, path: Path) -> None:
    """The three largest entries and the median of each layer's states (as the paper draws them), and the shares.

    The massive layer is marked; without one there are no shares. Written whole or not at all; raises OutputError
    where it cannot be.
    """
    pyplot = _pyplot()
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
        axes[0][2].bar(layers[: len(scan.attribution)], scan.attribution, color="C3")
        axes[0][2].set(
            title="written by the FFN", xlabel="layer", ylabel=f"share of dimension {scan.massive.dimension}"
        )
        axes[0][2].axhline(0, color="0.6", linewidth=0.8)
    for panel in axes[0]:
        _whole_layers(panel, None if scan.massive is None else scan.massive.layer)
    figure.suptitle(f"{scan.identity.model}, {scan.bos.token or scan.bos.id} alone", parse_math=False)
    _save(figure, path)


def plot_ablation(found: Ablation, path: Path) -> None:
    """Ratio over k, or over the layers, one panel a task (the paper's Figure 4); of an accuracy the points lost.

    Random rows are dashed, with their range, and rows of largest norm dotted.

    Written whole or not at all; raises OutputError where it cannot be.
    """
    pyplot = _pyplot()
    tasks = list(named(found.baseline))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for panel, task in zip(axes[0], tasks, strict=True):
        _curves(panel, found, task)
    # the panels have the same lines; beside them it hides none
    axes[0][-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def plot_training(log: Sequence[dict[str, Any]], p: Sequence[float], path: Path) -> None:
    """Loss and held-out loss over the steps, and below them p of each step where MacDrop dropped.

    log: entries of `step` with `loss` or `eval_loss`. Raises OutputError where it cannot be written.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        2 if p else 1, 1, figsize=(7, 5 if p else 4), sharex=True, squeeze=False, height_ratios=[3, 1] if p else None
    )
    upper = axes[0][0]
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
        if points:
            upper.plot(*zip(*points, strict=True), style, label=label)
    upper.set(ylabel="loss")
    upper.legend(frameon=False, fontsize="small")
    if p:
        axes[1][0].step(range(1, len(p) + 1), p, where="mid", color="C2")
        axes[1][0].set(ylabel="p", ylim=(-0.02, 1.02))
    axes[-1][0].set(xlabel="step")
    _save(figure, path)


def _whole_layers(panel: Any, marked: int | None) -> None:
    """Layers are whole numbers; behind the curves a band where the massive one is."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if marked is not None:
        panel.axvspan(marked - 0.4, marked + 0.4, color="C1", alpha=0.15, zorder=0)


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=_format(path), bbox_inches="tight", dpi=150)
    _pyplot().close(figure)
    write(path, drawn.getvalue())


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower()


def _curves(panel: Any, found: Ablation, task: str) -> None:
    """Over k, a line a mode; where several layers were attacked over them, a line an attack."""
    several = len({run.target.layer for run in found.runs}) > 1
    lines = dict.fromkeys(run.attack if several else run.attack.at(0) for run in found.runs)
    for at, line in enumerate(lines):
        runs = [run for run in found.runs if line == (run.attack if several else run.attack.at(0))]
        color, label = f"C{at % 10}", str(line) if several else line.name
        own = _points([run for run in runs if run.control is None], found, task, layers=several)
        panel.plot(list(own), [values[0] for values in own.values()], "o-", color=color, label=label)
        for control, style in (("random", "--"), ("norm", ":")):
            beside = [run for run in runs if (run.control or "").startswith(control)]
            drawn = _points(beside, found, task, layers=several)
            if drawn:
                mean = [statistics.fmean(values) for values in drawn.values()]
                panel.plot(list(drawn), mean, style, color=color, label=f"{label}, {control} rows")
                low, high = [min(v) for v in drawn.values()], [max(v) for v in drawn.values()]
                panel.fill_between(list(drawn), low, high, color=color, alpha=0.15, linewidth=0)
    ratio = named(found.baseline)[task].weights is not None
    panel.axhline(1 if ratio else 0, color="0.6", linewidth=0.8, zorder=0)
    label = "perplexity over the model's own" if ratio else "points against the model itself"
    panel.set(xlabel="layer" if several else "k", ylabel=label)
    panel.set_title(short(task), parse_math=False)  # a dollar sign in a file's name is no formula
    _readable(panel)


def _readable(panel: Any) -> None:
    """k and layers in whole numbers; ratios on a log axis where they span more than a decade, and never as powers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = panel.dataLim.intervaly  # of what is drawn: the axis has margins, which may reach below zero
    if low > 0 and high > 10 * low:
        panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))


def _points(runs: list[Run], found: Ablation, task: str, *, layers: bool) -> dict[int, list[float]]:
    """k, or the layer -> the ratios, or differences of accuracies in points, that are finite."""
    plain = named(found.baseline)[task]
    points: dict[int, list[float]] = {}
    for run in sorted(runs, key=lambda one: (one.target.layer, one.attack.k)):
        one = named(run.measured)[task]
        ratio = ratio_of(one, plain)
        change = points_of(one, plain) if ratio is None else ratio.value
        if change is not None and math.isfinite(change):
            points.setdefault(run.target.layer if layers else run.attack.k, []).append(change)
    return points


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")  # a file, never a window
    from matplotlib import pyplot as plt

    return plt
