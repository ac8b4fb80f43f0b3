"""Evaluations as a figure: what was measured, and how much of it is lost under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.evaluation.comparison import LEAST, Entry, paired, student_t
from mwtool.evaluation.document import COMPARISON, SCHEMA, entries_of
from mwtool.evaluation.numbers import figure as number
from mwtool.evaluation.numbers import fine, short
from mwtool.files.bars import Bar, draw_bars, height_of, spread
from mwtool.files.figure import document_of, fitting, local_name, model_name, panels, styled, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mwtool.evaluation.measurement import Measured
    from mwtool.evaluation.run import Evaluations

MOST = 24
"""Metrics that a figure shows; of groups with many subtasks, the whole comes first."""
LEGEND = 0.16
"""Height in inches of a line of the legend."""
LONGEST = 22
"""Characters of a model's name in the legend; the caption has all of them."""
UNATTACKED = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """One panel: bars by series, then by row."""

    title: str
    axis: str
    rows: tuple[str, ...]
    series: Mapping[str, Mapping[str, Bar]]
    base: float = 0
    logarithmic: bool = False


def plot_evaluation(found: Evaluations | Mapping[str, Any]) -> Figure:
    """Perplexities and accuracies as bars, and what each loses under attack or beside the first model.

    found: `Evaluations`, or the document of one evaluation or of a comparison, whose models stand on the same axes.
    Lines are 95 % confidence intervals. A change is paired: the same examples, attacked and not, or of two models.
    Raises BadValue for another document.
    """
    document = document_of(found, SCHEMA, COMPARISON)
    entries, left_out = _drawn(document)
    drawn = [*_values(entries), *_changes(entries)]
    names = list(dict.fromkeys(name for one in drawn for name in one.series))
    with styled():
        heights = [height_of(one.rows, len(one.series)) for one in drawn] or [0.5]
        columns = 2 if max(map(len, names), default=0) <= LONGEST else 1
        heights[0] += LEGEND * math.ceil(len(names) / columns)
        figure, axes = panels(heights, _caption(document, entries, left_out))
        for panel, one in zip(axes, drawn, strict=False):
            draw_bars(
                panel,
                one.rows,
                one.series,
                base=one.base,
                logarithmic=one.logarithmic,
                styles={name: at for at, name in enumerate(names)},
            )
            panel.set_title(title_of(one.title))
            panel.set(xlabel=one.axis)
        if not drawn:
            axes[0].set_axis_off()
            axes[0].text(0, 0.5, "No numbers: only answers in words.")
        if len(names) > 1:
            found_handles = {
                name: handle for panel in axes for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
            }
            figure.legend([found_handles[name] for name in names], names, loc="outside upper center", ncols=columns)
    return figure


def named_models(document: Mapping[str, Any]) -> list[str]:
    """What to call the model of each evaluation: names of files and folders by their last part, where these differ."""
    if document["schema"] == SCHEMA:
        return [model_name(document)]
    whole = list(document["names"])
    short_names = [local_name(name) for name in whole]
    return short_names if len(set(short_names)) == len(set(whole)) else whole


def evaluations_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a document: itself, or those that it compares."""
    return [dict(document)] if document["schema"] == SCHEMA else list(document["models"])


def reference_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """What a metric is compared with: of the same model without attack, else the first of its kind."""
    same = [one for one in entries if one.key == entry.key]
    own = next((one for one in same if one.model == entry.model and one.attack == UNATTACKED), None)
    reference = same[0] if own is None or own is entry else own
    return None if reference is entry else reference


def _drawn(document: Mapping[str, Any]) -> tuple[list[Entry], int]:
    """The metrics to draw, and how many are left out because there are too many."""
    entries = entries_of(evaluations_of(document), named_models(document))
    entries = [one for one in entries if not one.measured.answers]
    keys = sorted(dict.fromkeys(one.key for one in entries), key=lambda key: key[1] is not None)  # wholes first
    chosen = set(keys[:MOST])
    return [one for one in entries if one.key in chosen], len(keys) - len(chosen)


def _values(entries: Sequence[Entry]) -> list[_Panel]:
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(_unit(entry.measured), []).append(entry)
    return [_of_values(unit, same, entries) for unit, same in kinds.items()]


def _of_values(unit: str, entries: Sequence[Entry], beside: Sequence[Entry]) -> _Panel:
    """The metrics of one unit; `beside`: those of all units, from which series have their names."""
    percent = unit == "accuracy"
    scale = 100 if percent else 1
    finite = [one.measured.value for one in entries if math.isfinite(one.measured.value)]
    logarithmic = unit.endswith("perplexity") and spread(finite)
    series: dict[str, dict[str, Bar]] = {}
    for entry in entries:
        one = entry.measured
        known = not one.nonfinite and math.isfinite(one.value)
        low = high = None
        if known and one.stderr is not None and one.n >= LEAST:
            half = student_t(one.n - 1) * one.stderr  # no perplexity is below 1, no accuracy outside 0 to 100 %
            low = scale * max(one.value - half, 0.0 if percent else float(logarithmic))
            high = scale * (min(one.value + half, 1.0) if percent else one.value + half)
        value = scale * one.value
        label = "not finite" if not known else f"{value:.1f}" if percent else number(value)
        bar = Bar(value if known else None, low, high, label)
        series.setdefault(_series(entry, beside), {})[_row(entry)] = bar
    return _Panel(
        title=unit[:1].upper() + unit[1:],
        axis="accuracy, %" if percent else f"{unit}, log scale" if logarithmic else unit,
        rows=tuple(dict.fromkeys(map(_row, entries))),
        series=series,
        base=1 if logarithmic else 0,
        logarithmic=logarithmic,
    )


def _changes(entries: Sequence[Entry]) -> list[_Panel]:
    """Under attack against the same model without; without attacks, against the first model."""
    found: dict[str, dict[str, dict[str, Bar]]] = {}
    for entry in entries:
        reference = reference_of(entry, entries)
        change = None if reference is None else paired(entry.measured, reference.measured)
        if change is not None and math.isfinite(change.value):
            shape = {"ratio": f"x{fine(change.value)}", "points": f"{change.value:+.1f}"}
            bar = Bar(change.value, change.low, change.high, shape.get(change.kind, f"{change.value:+.3g}"))
            found.setdefault(change.kind, {}).setdefault(_series(entry, entries), {})[_row(entry)] = bar
    return [_of_changes(kind, _beside(entries), series) for kind, series in found.items()]


def _beside(entries: Sequence[Entry]) -> str:
    """What changes are measured from, as far as it is the same for all of them."""
    compared = [(entry, reference) for entry in entries if (reference := reference_of(entry, entries)) is not None]
    others = {reference.model for entry, reference in compared if reference.model != entry.model}
    if not others:
        return "{} under attack"
    attacked = any(entry.attack != UNATTACKED for entry, _ in compared)
    return "{}, change" if attacked or len(others) > 1 else f"{{}} beside {fitting(others.pop(), LONGEST)}"


def _of_changes(kind: str, title: str, series: Mapping[str, Mapping[str, Bar]]) -> _Panel:
    values = [bar.value for bars in series.values() for bar in bars.values() if bar.value is not None]
    ratio = kind == "ratio"
    logarithmic = ratio and spread([1.0, *values])
    what, axis = {
        "ratio": ("Perplexity", "perplexity ratio"),
        "points": ("Accuracy", "accuracy, points gained or lost"),
    }.get(kind, ("Other metrics", "difference"))
    return _Panel(
        title=title.format(what),
        axis=axis + (", log scale" if logarithmic else ""),
        rows=tuple(dict.fromkeys(row for bars in series.values() for row in bars)),
        series=series,
        base=1 if ratio else 0,
        logarithmic=logarithmic,
    )


def _unit(one: Measured) -> str:
    """What a metric counts: metrics of one unit share an axis."""
    if one.weights is not None:
        return one.metric
    return "accuracy" if one.samples and all(value in (0, 1) for value in one.samples) else one.metric


def _row(entry: Entry) -> str:
    one = entry.measured
    metric = "" if one.metric in ("acc", "perplexity") else one.metric
    return " ".join(filter(None, (short(one.task), one.part, metric)))


def _series(entry: Entry, entries: Sequence[Entry]) -> str:
    """The model where there are several, and the attack where there are several."""
    models, attacks = {one.model for one in entries}, {one.attack for one in entries}
    attack = "no attack" if entry.attack == UNATTACKED else entry.attack
    if len(models) == 1:
        return attack
    model = fitting(entry.model, LONGEST)
    return model if len(attacks) == 1 else f"{model}, {attack}"


def _caption(document: Mapping[str, Any], entries: Sequence[Entry], left_out: int) -> str:
    """Models, rows attacked, sizes."""
    named = zip(named_models(document), evaluations_of(document), strict=True)
    said = "; ".join(f"{name} ({one['dtype']})" for name, one in named) + ". "
    sizes = dict.fromkeys(map(_size, entries))
    said += "; ".join(sizes) + "."
    if any(entry.measured.stderr is not None for entry in entries):
        said += " Lines: 95\N{NO-BREAK SPACE}% confidence intervals; of a change, paired."
    if _beside(entries) == "{}, change":
        said += f" Changes: under attack beside the same model without, else beside {entries[0].model}."
    for one in evaluations_of(document)[:1]:
        if one["massive"] is not None:
            said += f" Rows of layer {one['massive']['layer']}."
    if left_out:
        said += f" {left_out} more metrics are in the document."
    return said


def _size(entry: Entry) -> str:
    one = entry.measured
    unit = (
        "windows" if one.weights is not None and one.metric == "perplexity" and "window" in one.setting else "examples"
    )
    width = f" of {one.setting['window']} tokens" if one.setting.get("window") else ""
    return f"{short(one.task)}: {one.n} {unit}{width}"
