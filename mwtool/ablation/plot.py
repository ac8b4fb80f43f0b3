"""The ablation as a figure."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.evaluation.comparison import named, points_of, ratio_of
from mwtool.evaluation.numbers import short
from mwtool.files.figure import load_pyplot, save_figure

if TYPE_CHECKING:
    from mwtool.ablation.sweep import Ablation, Run


def plot_ablation(found: Ablation, path: Path) -> None:
    """Ratio over k, or over the layers, one panel a task (the paper's Figure 4); of an accuracy the points lost.

    Random rows are dashed, with their range, and rows of largest norm dotted.

    Written whole or not at all; raises OutputError where it cannot be.
    """
    pyplot = load_pyplot()
    tasks = list(named(found.baseline))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for panel, task in zip(axes[0], tasks, strict=True):
        _curves(panel, found, task)
    # the panels have the same lines; beside them it hides none
    axes[0][-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def _curves(panel: Any, found: Ablation, task: str) -> None:
    """Over k, a line a mode; where several layers were attacked over them, a line an attack."""
    several = len({run.targets for run in found.runs}) > 1
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
    for run in sorted(runs, key=lambda one: (one.layers, one.attack.k)):
        one = named(run.measured)[task]
        ratio = ratio_of(one, plain)
        change = points_of(one, plain) if ratio is None else ratio.value
        if change is not None and math.isfinite(change):
            points.setdefault(run.layers[0] if layers else run.attack.k, []).append(change)
    return points
