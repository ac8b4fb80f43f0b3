"""Curricula as a figure: p over the optimizer steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadValue
from mwtool.files.figure import MUTED, PALETTE, count_axis, panels, styled
from mwtool.macdrop.curriculum import Curriculum
from mwtool.macdrop.curriculum_yaml import read_curriculum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)))
"""One for each colour, so that curves also differ in grey."""
LEGEND = 0.16
"""Height in inches of a line of the legend."""


def plot_curriculum(*curricula: Curriculum | str, steps: int = 579, per_epoch: int | None = None) -> Figure:
    """p, the probability that an entry is dropped, over the optimizer steps of each curriculum (Figure 7 of the paper).

    curricula: or what `--macdrop` takes, such as `step:0.8` or a YAML file. steps: of the run; 579 are those of the
    paper. per_epoch: steps in an epoch; None: the run is one. Raises BadValue without a curriculum, and where the
    phases of one do not fit into so many steps; BadSyntax for a schedule that cannot be read.
    """
    if not curricula:
        raise BadValue("no curriculum is given; expected one or more, such as step:0.8")
    named = {str(one): one if isinstance(one, Curriculum) else read_curriculum(one) for one in curricula}
    with styled():
        figure, (panel,) = panels([1.9 + LEGEND * math.ceil(len(named) / 2)], _caption(steps, per_epoch))
        for at, (name, curriculum) in enumerate(named.items()):
            color, dashes = PALETTE[at % len(PALETTE)], DASHES[at % len(DASHES)]
            values = curriculum.values(steps, per_epoch)
            panel.step(range(1, steps + 1), values, where="mid", color=color, linestyle=dashes, label=name)
        for last in range(per_epoch or steps, steps, per_epoch or steps):
            panel.axvline(last + 0.5, color=MUTED, linewidth=0.7, linestyle=":", zorder=0)
        panel.set_title("MacDrop: probability that an entry is dropped")
        panel.set(xlabel="optimizer step", ylabel="p", ylim=(-0.03, 1.03))
        count_axis(panel)
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _caption(steps: int, per_epoch: int | None) -> str:
    epochs = 1 if per_epoch is None else math.ceil(steps / per_epoch)
    said = f"p of each curriculum over {steps:,} steps"
    return f"{said}." if epochs == 1 else f"{said} of {epochs} epochs, whose ends are dotted."
