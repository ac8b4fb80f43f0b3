"""The ablation as a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadValue
from mwtool.evaluation.numbers import short
from mwtool.files.figure import (
    MARKERS,
    MUTED,
    PALETTE,
    count_axis,
    document_of,
    model_name,
    panels,
    plain_numbers,
    styled,
    title_of,
)
from mwtool.massive import ABLATION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mwtool.ablation.sweep import Ablation

SPREAD = 0.36
"""Part of the distance between two values of k over which the series are set side by side."""
DASHES = ("--", "-.")
"""Of the random rows of one series and the next, which also differ in grey."""
HEIGHT, LEGEND = 2.1, 0.16
"""Height in inches of a panel, and of a line of the legend."""


def plot_ablation(ablation: Ablation | Mapping[str, Any]) -> Figure:
    """Perplexity over the model's own, or accuracy points gained, with one panel a task (Figure 4 of the paper).

    ablation: an `Ablation`, or the document of one. The horizontal axis is k, the number of rows; where rows of
    several places were attacked one after the other, it is the place, and points are not joined. Bars are 95 %
    confidence intervals. A band is the range of the random rows, around their mean; diamonds are the rows of largest
    norm. Series are set side by side, so that equal ones do not hide each other. Raises BadValue for another document.
    """
    document = document_of(ablation, ABLATION)
    tasks = [task["name"] for task in document["tasks"]]
    if not tasks:
        raise BadValue("no task of this ablation has been measured under all attacks; resume it first")
    with styled():
        height = HEIGHT + _legend_height(document) / len(tasks)
        figure, axes = panels([height] * len(tasks), _caption(document))
        for panel, task in zip(axes, tasks, strict=True):
            draw_task(panel, document, task)
        entries = {name: line for panel in axes for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        names = sorted(entries, key=lambda name: _order(name, document))
        figure.legend([entries[name] for name in names], names, loc="outside upper center", ncols=2)
    return figure


def draw_task(panel: Axes, document: Mapping[str, Any], task: str) -> None:
    """The effects on one task: a series for each attack, and its controls."""
    runs, layered = document["runs"], len(places_of(document)) > 1
    positions = _positions(document)
    series = dict.fromkeys(_series(run, layered=layered) for run in runs)
    step = SPREAD / max(2, len(series))
    for at, name in enumerate(series):
        own = [run for run in runs if _series(run, layered=layered) == name]
        color, marker = PALETTE[at % len(PALETTE)], MARKERS[at % len(MARKERS)]
        shift = (at - (len(series) - 1) / 2) * step
        where = {key: place + shift for key, place in positions.items()}
        join = "" if layered else "-"
        random = _points(own, "random", task, layered=layered)
        dashes = DASHES[at % len(DASHES)]
        _random(panel, random, where, color, name=name, layered=layered, width=step, dashes=dashes)
        ranked = _ranked(own, task, layered=layered)
        places = [where[key] for key in ranked]
        values, below, above = zip(*ranked.values(), strict=True) if ranked else ((), (), ())
        style = f"{marker}{join}"
        panel.errorbar(places, values, yerr=(below, above), fmt=style, color=color, label=name, elinewidth=0.9)
        norm = _points(own, "norm", task, layered=layered)
        if norm:
            panel.plot(
                [where[key] for key in norm],
                [values[0] for values in norm.values()],
                f"D{':' if join else ''}",
                color=color,
                markerfacecolor="white",
                markersize=5,
                zorder=1.9,  # behind the attack itself, around whose points it shows where both are equal
                label=f"{name}, rows of largest norm",
            )
    _axes(panel, document, task, positions)


def places_of(document: Mapping[str, Any]) -> list[str]:
    """The layers attacked together in each run, such as `11` or `2+11`, once each."""
    return list(dict.fromkeys(map(_place, document["runs"])))


def effect(run: Mapping[str, Any], task: str) -> float | None:
    """The ratio of perplexities, or the difference of accuracies in points; None where it is not finite."""
    value: float | None = run["ratio"][task] if run["ratio"][task] is not None else run["delta"][task]
    return value


def _interval(run: Mapping[str, Any], task: str) -> list[float | None] | None:
    """The interval of the effect; None if there is none, or if an older document has none of differences."""
    found: list[float | None] | None = run["interval"][task] or run.get("delta_interval", {}).get(task)
    return found


def _place(run: Mapping[str, Any]) -> str:
    return "+".join(str(one["layer"]) for one in run["places"])


def _series(run: Mapping[str, Any], *, layered: bool) -> str:
    return f"{run['mode']} {run['k']}" if layered else str(run["mode"])


def _key(run: Mapping[str, Any], *, layered: bool) -> str:
    return _place(run) if layered else str(run["k"])


def _positions(document: Mapping[str, Any]) -> dict[str, float]:
    """Place or k -> where on the horizontal axis: whole layers at their number, all else evenly spaced."""
    places = places_of(document)
    if len(places) == 1:
        return {str(k): float(at) for at, k in enumerate(sorted({run["k"] for run in document["runs"]}))}
    if all(place.isdigit() for place in places):
        return {place: float(place) for place in places}
    return {place: float(at) for at, place in enumerate(places)}


def _points(runs: Sequence[Mapping[str, Any]], control: str, task: str, *, layered: bool) -> dict[str, list[float]]:
    """Place or k -> the effects of the controls of this kind."""
    points: dict[str, list[float]] = {}
    for run in runs:
        value = effect(run, task)
        if (run["control"] or "").startswith(control) and value is not None:
            points.setdefault(_key(run, layered=layered), []).append(value)
    return points


def _ranked(runs: Sequence[Mapping[str, Any]], task: str, *, layered: bool) -> dict[str, tuple[float, float, float]]:
    """Place or k -> the effect of the attack on the ranked rows, and how far its interval reaches below and above."""
    found = {}
    for run in runs:
        value = effect(run, task)
        if run["control"] is None and value is not None:
            low, high = _interval(run, task) or (None, None)
            below, above = 0.0 if low is None else value - low, 0.0 if high is None else high - value
            found[_key(run, layered=layered)] = value, below, above
    return found


def _random(
    panel: Axes,
    points: Mapping[str, list[float]],
    where: Mapping[str, float],
    color: str,
    *,
    name: str,
    layered: bool,
    width: float,
    dashes: str,
) -> None:
    """Mean and range of the random rows: a band over k, a box at each layer."""
    if not points:
        return
    at = [where[key] for key in points]
    mean = [statistics.fmean(values) for values in points.values()]
    low, high = [min(values) for values in points.values()], [max(values) for values in points.values()]
    label = f"{name}, random rows"
    if layered:
        panel.bar(at, [b - a for a, b in zip(low, high, strict=True)], width, low, color=color, alpha=0.2)
        panel.plot(at, mean, "_", color=color, markersize=6, label=label)
    else:
        panel.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(at, mean, dashes, color=color, label=label)


def _axes(panel: Axes, document: Mapping[str, Any], task: str, positions: Mapping[str, float]) -> None:
    """Names and units; a log axis for ratios over more than a decade; a line where nothing changes."""
    metric = next(one["metric"] for one in document["tasks"] if one["name"] == task)
    ratio = metric == "perplexity"
    panel.axhline(1 if ratio else 0, color=MUTED, linewidth=0.8, zorder=0)
    layered = len(places_of(document)) > 1
    panel.set_title(title_of(short(task)))
    panel.set(
        xlabel="decoder layers attacked (from 0)" if layered else "rows attacked, k",
        ylabel="perplexity ratio" if ratio else f"change of {metric}, points",
    )
    low, high = panel.dataLim.intervaly  # of what is drawn: the axis has margins, which may reach below zero
    if low > 0 and high > 10 * low:
        panel.set_yscale("log")
    plain_numbers(panel)
    if layered and all(place.isdigit() for place in positions):
        count_axis(panel)
    else:
        panel.set_xticks(list(positions.values()), list(positions))


def _order(entry: str, document: Mapping[str, Any]) -> tuple[int, int]:
    """In the legend the attack comes first and its controls after it."""
    layered = len(places_of(document)) > 1
    series = list(dict.fromkeys(_series(run, layered=layered) for run in document["runs"]))
    name, _, control = entry.partition(", ")
    return series.index(name), ("", "random rows", "rows of largest norm").index(control)


def _legend_height(document: Mapping[str, Any]) -> float:
    layered = len(places_of(document)) > 1
    controls = {(run["control"] or "own").partition(":")[0] for run in document["runs"]}
    entries = len({_series(run, layered=layered) for run in document["runs"]}) * len(controls)
    return LEGEND * math.ceil(entries / 2)


def _caption(document: Mapping[str, Any]) -> str:
    """Model, place, text and settings."""
    said = f"{model_name(document)} ({document['dtype']})"
    places = places_of(document)
    run = next((one for one in document["runs"] if len(one["places"]) == 1), None)
    if len(places) == 1:
        expert = "" if run is None or run["expert"] is None else f", expert {run['expert']}"
        said += f", layer{'s' if '+' in places[0] else ''} {places[0].replace('+', ' and ')}{expert}"
    said += ". " + "; ".join(_measured(one) for one in document["tasks"]) + "."
    if any(_interval(run, task) for run in document["runs"] for task in run["interval"]):
        said += " Bars: 95\N{NO-BREAK SPACE}% confidence intervals."
    draws = {one["control"] for one in document["runs"] if (one["control"] or "").startswith("random")}
    if draws:
        said += f" {'Boxes' if len(places) > 1 else 'Bands'}: range of {len(draws)} random draws."
    return said


def _measured(task: Mapping[str, Any]) -> str:
    settings = task["setting"] or {}
    unit = "windows" if task["metric"] == "perplexity" else "questions"
    width = f" of {settings['window']} tokens" if settings.get("window") else ""
    return f"{short(task['name'])}: {task['n']} {unit}{width}"
