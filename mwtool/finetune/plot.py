"""The training curves as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.files.figure import load_pyplot, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence


def plot_training(log: Sequence[dict[str, Any]], p: Sequence[float], path: Path) -> None:
    """Loss and held-out loss over the steps, and below them p of each step where MacDrop dropped.

    log: entries of `step` with `loss` or `eval_loss`. Raises OutputError where it cannot be written.
    """
    pyplot = load_pyplot()
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
    save_figure(figure, path)
