"""Evaluations as a figure: what was measured, and how much of it is lost under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.evaluation.comparison import LEAST, Entry, is_accuracy, is_number, paired, student_t
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
OTHER = "Other metrics"
"""What changes are called that are neither ratios nor points, nor on a scale of `SCALES`."""
LONGEST = 22
"""Characters of a model's name in the legend; the caption has all of them."""
UNATTACKED = "none"
SCALES: dict[str, tuple[str, int, int]] = {
    "judge": ("Judge's score", 1, 5),
    "longbench": ("LongBench score", 0, 1),
}
"""Of scored answers, by the key of their setting: what the scale is called, and its ends. Its metrics share an axis."""


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
    """Perplexities, accuracies and scores as bars, and what each loses under attack or beside the first model.

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
            axes[0].text(0, 0.5, "No numbers: only answers that nobody scored.")
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
    entries = [one for one in entries if is_number(one.measured)]
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
    scale = 100 if unit == "accuracy" else 1
    finite = [one.measured.value for one in entries if math.isfinite(one.measured.value)]
    logarithmic = unit.endswith("perplexity") and spread(finite)
    least, most = _ends(unit, logarithmic=logarithmic)
    series: dict[str, dict[str, Bar]] = {}
    for entry in entries:
        one = entry.measured
        known = not one.nonfinite and math.isfinite(one.value)
        low = high = None
        if known and one.stderr is not None and one.n >= LEAST:
            half = student_t(one.n - 1) * one.stderr
            low, high = max(scale * (one.value - half), least), min(scale * (one.value + half), most)
        value = scale * one.value
        label = "not finite" if not known else f"{value:.1f}" if unit == "accuracy" else number(value)
        bar = Bar(value if known else None, low, high, label)
        series.setdefault(_series(entry, beside), {})[_row(entry)] = bar
    axis = f"{unit}, %" if unit == "accuracy" else f"{unit}, {least} to {most}" if math.isfinite(most) else unit
    return _Panel(
        title=unit[:1].upper() + unit[1:],
        axis=axis + (", log scale" if logarithmic else ""),
        rows=tuple(dict.fromkeys(map(_row, entries))),
        series=series,
        base=least,
        logarithmic=logarithmic,
    )


def _ends(unit: str, *, logarithmic: bool) -> tuple[float, float]:
    """The values between which a metric of this unit lies: bars begin at the first, intervals end at both."""
    if unit == "accuracy":
        return 0, 100
    scale = next((ends for name, *ends in SCALES.values() if name == unit), (int(logarithmic), math.inf))
    return scale[0], scale[1]


def _changes(entries: Sequence[Entry]) -> list[_Panel]:
    """Under attack against the same model without; without attacks, against the first model."""
    found: dict[tuple[str, str], dict[str, dict[str, Bar]]] = {}
    for entry in entries:
        reference = reference_of(entry, entries)
        change = None if reference is None else paired(entry.measured, reference.measured)
        if change is not None and math.isfinite(change.value):
            shape = {"ratio": f"x{fine(change.value)}", "points": f"{change.value:+.1f}"}
            bar = Bar(change.value, change.low, change.high, shape.get(change.kind, f"{change.value:+.3g}"))
            what = {"ratio": "Perplexity", "points": "Accuracy"}.get(change.kind, _scale(entry.measured) or OTHER)
            found.setdefault((change.kind, what), {}).setdefault(_series(entry, entries), {})[_row(entry)] = bar
    return [_of_changes(kind, _beside(entries).format(what), series) for (kind, what), series in found.items()]


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
    axis = {"ratio": "perplexity ratio", "points": "accuracy, points gained or lost"}.get(kind, "difference")
    return _Panel(
        title=title,
        axis=axis + (", log scale" if logarithmic else ""),
        rows=tuple(dict.fromkeys(row for bars in series.values() for row in bars)),
        series=series,
        base=1 if ratio else 0,
        logarithmic=logarithmic,
    )


def _unit(one: Measured) -> str:
    """What a metric counts: metrics of one unit share an axis."""
    return _scale(one) or ("accuracy" if is_accuracy(one) else one.metric)


def _scale(one: Measured) -> str | None:
    """The scale of scored answers; None of others."""
    return next((name for key, (name, *_) in SCALES.items() if key in one.setting), None)


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
    windows = one.weights is not None and one.metric == "perplexity" and "window" in one.setting
    unit = "windows" if windows else "answers" if one.answers else "examples"
    width = f" of {one.setting['window']} tokens" if one.setting.get("window") else ""
    part = f" {one.part}" if one.answers and one.part else ""  # datasets of one file differ in size
    return f"{short(one.task)}{part}: {one.n} {unit}{width}"
