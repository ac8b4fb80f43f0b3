"""A quantization check as a figure: what each set of protected weights gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mwtool.evaluation.comparison import LEAST, student_t
from mwtool.evaluation.numbers import figure as number
from mwtool.evaluation.numbers import fine, short
from mwtool.files.bars import Bar, draw_bars, height_of, spread
from mwtool.files.figure import document_of, model_name, panels, styled, title_of
from mwtool.quantization.document import SCHEMA
from mwtool.quantization.rounding import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND = 0.16
"""Height in inches of a line of the legend."""
NOTHING = "nothing"


def plot_quantization(check: Mapping[str, Any]) -> Figure:
    """The share of the loss from quantizing that each set of protected weights gives back, one panel a task.

    check: the document of a quantization check. A series is a number of bits. Where quantizing costs too little to give
    anything back, and for accuracies, the panel shows the results themselves. Lines are 95 % confidence intervals.
    Raises BadValue for another document.
    """
    document = document_of(check, SCHEMA)
    schemes = list(dict.fromkeys(one["bits"] for one in document["variants"]))
    tasks = range(len(document["baseline"]))
    shares = [any(one["shares_given_back"][at] for one in document["variants"]) for at in tasks]
    rows = [_rows(document, nothing=not share) for share in shares]
    with styled():
        heights = [height_of(names, len(schemes)) + LEGEND * len(schemes) for names in rows]
        figure, axes = panels(heights, _caption(document))
        for at, panel, share, names in zip(tasks, axes, shares, rows, strict=True):
            _draw(panel, document, at, names, share=share)
    return figure


def label_of(variant: Mapping[str, Any]) -> str:
    """What a variant keeps in full precision; a control is called one."""
    name = variant["protected"] or NOTHING
    return f"{name} (control)" if variant["control"] else name


def _rows(document: Mapping[str, Any], *, nothing: bool) -> list[str]:
    names = dict.fromkeys(map(label_of, document["variants"]))
    return [name for name in names if nothing or name != NOTHING]


def _draw(panel: Axes, document: Mapping[str, Any], at: int, rows: Sequence[str], *, share: bool) -> None:
    task = document["baseline"][at]
    series: dict[str, dict[str, Bar]] = {}
    for variant in document["variants"]:
        bar = _share(variant, at) if share else _result(variant, at)
        name = _scheme(document, variant["bits"], at)
        if bar is not None and label_of(variant) in rows:
            series.setdefault(name, {})[label_of(variant)] = bar
    values = [bar.value for bars in series.values() for bar in bars.values() if bar.value is not None]
    logarithmic = not share and task["weights"] is not None and spread(values)
    draw_bars(panel, rows, series, base=1 if logarithmic else 0, logarithmic=logarithmic)
    panel.set_title(title_of(f"{short(task['task'])}{_part(task)}"), pad=4 + 72 * LEGEND * len(series))
    panel.set(xlabel="share of the loss given back, %" if share else _unit(task))
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _part(task: Mapping[str, Any]) -> str:
    return "" if task["metric"] in ("perplexity", "acc") else f" {task['metric']}"


def _unit(task: Mapping[str, Any]) -> str:
    return str(task["metric"]) if task["weights"] is not None else f"{task['metric']}, %"


def _scheme(document: Mapping[str, Any], bits: int, at: int) -> str:
    """A number of bits, and what quantizing everything to it costs."""
    plain = next(one for one in document["variants"] if one["bits"] == bits and one["protected"] is None)
    full, result, ratio = document["baseline"][at], plain["results"][at], plain["ratios"][at]
    costs = f"{_shown(full)} to {_shown(result)}" + ("" if ratio is None else f", x{fine(ratio['value'])}")
    return f"{bits} bits: {costs}"


def _shown(result: Mapping[str, Any]) -> str:
    if result["value"] is None:
        return "not finite"
    return number(result["value"]) if result["weights"] is not None else f"{100 * result['value']:.1f}"


def _share(variant: Mapping[str, Any], at: int) -> Bar | None:
    found = variant["shares_given_back"][at]
    if found is None:
        return None
    value, low, high = (None if found[key] is None else 100 * found[key] for key in ("value", "low", "high"))
    return Bar(value, low, high, "" if value is None else f"{round(value)}")


def _result(variant: Mapping[str, Any], at: int) -> Bar:
    result = variant["results"][at]
    scale = 1 if result["weights"] is not None else 100
    value = None if result["value"] is None else scale * result["value"]
    if value is None or result["stderr"] is None or result["n"] < LEAST:
        return Bar(value, None, None, _shown(result))
    half = scale * student_t(result["n"] - 1) * result["stderr"]
    return Bar(value, value - half, value + half, _shown(result))


def _caption(document: Mapping[str, Any]) -> str:
    group = "a row" if document["group"] is None else f"groups of {document['group']}"
    said = f"{model_name(document)} ({document['dtype']}), {document['method']}, {group}, "
    said += LEVELS.get(document["levels"], document["levels"])
    sizes = dict.fromkeys(
        f"{short(one['task'])}: {one['n']} {'windows' if one['weights'] is not None else 'examples'}"
        for one in document["baseline"]
    )
    return f"{said}. {'; '.join(sizes)}. Lines: 95\N{NO-BREAK SPACE}% confidence intervals."
