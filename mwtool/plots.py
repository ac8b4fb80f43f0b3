"""Results as figures, with matplotlib. Knows results only; computes nothing."""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.errors import OutputError
from mwtool.verdict import named, points_of, ratio_of, short
from mwtool.whole import write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mwtool.ablate import Ablation, Run


def check_plottable(path: Path) -> None:
    """Raise before the work begins if no figure could be written to `path` after it."""
    pyplot = _pyplot()
    figure = pyplot.figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if _format(path) not in known:
        raise OutputError(f"{path}: no figure of type {path.suffix or '(none)'}; expected one of {', '.join(known)}")


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
