"""The report of an ablation, with Rich: the paper's Table 1 with controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mwtool.ablation.sweep import Ablation, Run, controls_of
from mwtool.ablation.verdict import Verdict
from mwtool.evaluation.comparison import named, points_of, ratio_of
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.numbers import figure, short, shown
from mwtool.evaluation.task_mean import TaskMean, task_means
from mwtool.scan.targets import Target

BESIDE, WIDE = 26, 46
"""Width of the columns that name the attack, and of those for one task with its controls."""
PANEL = 24
"""Smallest width of a continuation."""
SHOWN = 8
"""How many row indices are listed."""


def ablate_report(found: Ablation, generated: Sequence[tuple[str, str]] = (), width: int = 80) -> RenderableType:
    """The table, split into parts that fit the width, the verdicts, and the continuations side by side."""
    step = max(1, (width - BESIDE) // WIDE)
    pieces = [range(start, min(start + step, len(found.baseline))) for start in range(0, len(found.baseline), step)]
    parts: list[RenderableType] = [_where(found)]
    for piece in pieces:
        parts += [_table(found, piece), Text()]
    for metric in [one.metric for one in task_means(found.baseline)]:
        parts += _mean_table(found, metric)
    parts += [Text(f"{line}\n") for line in _nonfinite(found)]
    parts += [Text(f"{one.text}\n") for one in _foremost(found)]
    if generated:
        room = max(PANEL, (width + 1) // len(generated) - 1)  # all side by side if they fit, a column between them
        parts.append(Columns([Panel(Text(text), title=attack, width=room) for attack, text in generated]))
    return Group(*parts)


def _where(found: Ablation) -> Text:
    groups = list(dict.fromkeys(run.targets for run in found.runs))
    if len(groups) > 1:
        return Text("the rows of largest |z| in each layer\n")
    together = "" if len(groups[0]) == 1 else "attacked together:\n"
    return Text(together + "".join(_ranked(target) for target in groups[0]))


def _ranked(target: Target) -> str:
    rows = ", ".join(map(str, target.indices[:SHOWN])) + (" ..." if len(target.indices) > SHOWN else "")
    expert = "" if target.expert is None else f", expert {target.expert}"
    return f"rows of {target.module}{expert} (layer {target.layer}), ranked: {rows}\n"


def _table(found: Ablation, tasks: Sequence[int]) -> Table:
    """One line for each attack; for each task the value, its ratio to the baseline, and the ratios of the controls."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    layers = len({run.targets for run in found.runs}) > 1
    controls = any(run.control for run in found.runs)
    for column in (*(["layer"] if layers else []), "attack", "rows"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    names = list(named(found.baseline))
    for at in tasks:
        for column in (short(names[at]), "ratio", *(["random", "norm"] if controls else [])):
            table.add_column(Text(column), justify="right", no_wrap=True)  # brackets in a file's name are no markup
    start = [*([""] if layers else []), "none", "0"]
    blank = [""] * (3 if controls else 1)
    table.add_row(*start, *(cell for at in tasks for cell in (shown(found.baseline[at]), *blank)))
    for run in found.runs:
        if run.control is None:
            place = [run.place] if layers else []
            table.add_row(*place, run.attack.name, str(run.attack.k), *_cells(run, found, tasks, controls=controls))
    return table


def _mean_table(found: Ablation, metric: str) -> list[RenderableType]:
    """The mean of one accuracy over tasks, and its change beside the unchanged model in points, paired by questions."""
    plain = next(one for one in task_means(found.baseline) if one.metric == metric)
    table = Table(box=None, pad_edge=False, header_style="bold")
    layers = len({run.targets for run in found.runs}) > 1
    for column in (*(["layer"] if layers else []), "attack", "rows", f"mean {metric}"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for column in ("± s.e.", "points", "95 % interval", "random", "norm"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(place: list[str], attack: str, k: int, mean: TaskMean, rest: Sequence[str]) -> None:
        error = "" if mean.stderr is None else f"{100 * mean.stderr:.1f}"
        table.add_row(*(place if layers else []), attack, str(k), f"{100 * mean.value:.1f}", error, *rest)

    row([""], "none", 0, plain, ())
    for run in found.runs:
        mean = next((one for one in task_means(run.measured) if one.metric == metric), None)
        if run.control is None and mean is not None:
            change = mean.beside(plain)
            interval = "" if change is None or change.low is None else f"[{change.low:+.1f}, {change.high:+.1f}]"
            points = "" if change is None else f"{change.value:+.1f}"
            row(
                [run.place], run.attack.name, run.attack.k, mean, (points, interval, *_mean_controls(run, found, plain))
            )
    return [Text(f"the mean of {len(plain.tasks)} tasks, in percent"), table, Text()]


def _mean_controls(run: Run, found: Ablation, plain: TaskMean) -> Iterator[str]:
    """Points lost under random rows (mean and standard deviation over the draws), and under those of largest norm."""
    for norm in (False, True):
        beside = [one for one in controls_of(run, found.runs) if (one.control == "norm") == norm]
        means = [mean for one in beside for mean in task_means(one.measured) if mean.metric == plain.metric]
        changes = [100 * (mean.value - plain.value) for mean in means]
        spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
        yield f"{statistics.fmean(changes):+.1f}{spread}" if changes else ""


def _cells(run: Run, found: Ablation, tasks: Sequence[int], *, controls: bool) -> Iterator[str]:
    beside = controls_of(run, found.runs)
    for at in tasks:
        one, plain = run.measured[at], found.baseline[at]
        yield shown(one)
        yield _change(one, plain)
        if controls:
            yield _spread([control.measured[at] for control in beside if control.control != "norm"], plain)
            yield _spread([control.measured[at] for control in beside if control.control == "norm"], plain)


def _spread(controls: Sequence[Measured], plain: Measured) -> str:
    """Mean and standard deviation of the controls' ratios, or of their differences in percentage points."""
    if not controls:
        return ""
    points = [points for one in controls if (points := points_of(one, plain)) is not None]
    ratios = [ratio.value for one in controls if (ratio := ratio_of(one, plain)) is not None]
    values = points or ratios
    if len(values) < len(controls):
        return "not finite"
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    shown = [f"{mean:+.1f}"] if points else [figure(mean)]
    if spread is not None:
        shown.append(f"{spread:.1f}" if points else figure(spread))
    return " ± ".join(shown)


def _change(one: Measured, plain: Measured) -> str:
    points, ratio = points_of(one, plain), ratio_of(one, plain)
    if points is not None:
        return f"{points:+.1f}"
    return "not finite" if ratio is None else f"x{figure(ratio.value)}"


def _foremost(found: Ablation) -> Iterator[Verdict]:
    """For each mode, the verdicts at the largest k, and at the number of truly massive rows if it was tried."""
    groups = {run.targets for run in found.runs}
    if len(groups) > 1:
        return  # a line a layer is enough
    counts = {target.count for group in groups for target in group}
    largest = max((one.attack.k for one in found.verdicts), default=0)
    for one in found.verdicts:
        if one.attack.k in (largest, *counts):
            yield one


def _nonfinite(found: Ablation) -> Iterator[str]:
    """Why values are missing."""
    measured = [("without an attack", found.baseline)]
    measured += [(f"{run.attack} in layer {run.place}", run.measured) for run in found.runs if not run.control]
    for under, several in measured:
        for name, one in named(several).items():
            if one.nonfinite:
                yield f"{short(name)} is not finite {under}: {one.nonfinite}."
