"""The figures of a study: effects over k (Figure 4), over p by scope (Figure 6), over p0 by curriculum (Figure 7)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.ablation.plot import plot_ablation
from mwtool.files.figure import MARKERS, PALETTE, model_name, panels, plain_numbers, save_figure, styled
from mwtool.files.text import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, Mapping[str, Any]]
"""Where it stands on the horizontal axis, and its cell."""


def save_figures(document: Mapping[str, Any], folder: Path, sweep: Path) -> list[str]:
    """Draw what there is to draw, and return the names of the files. sweep: the ablation on texts, if there is one."""
    figures: dict[str, Figure] = {}
    if sweep.exists():
        figures["figure4.texts.svg"] = plot_ablation(dict(read_json(sweep)))
    for table in document["tables"]:
        if table["name"] in DRAWN:
            label, series = DRAWN[table["name"]]
            drawn = _figure(document, table, label, dict(series(table)))
            if drawn is not None:
                figures[f"{table['name']}.svg"] = drawn
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def _figure(
    document: Mapping[str, Any], table: Mapping[str, Any], label: str, series: dict[str, list[tuple[float, Any]]]
) -> Figure | None:
    """One panel for each column that has points: values with their intervals, one series below the other."""
    columns = [
        column
        for column in table["columns"]
        if any(_has(line["cells"].get(column["name"])) for points in series.values() for _, line in points)
    ]
    if not columns:
        return None
    with styled():
        figure, axes = panels([1.9] * len(columns), f"{model_name(document)}. {table['title']}.")
        for panel, column in zip(axes, columns, strict=True):
            for at, (name, points) in enumerate(series.items()):
                cells = [(x, line["cells"].get(column["name"])) for x, line in points]
                _draw(panel, [(x, cell) for x, cell in cells if _has(cell)], name, at)
            panel.set_title(column["name"])
            panel.set(ylabel="accuracy, percent" if column["higher_is_better"] else "perplexity")
            if not column["higher_is_better"]:
                panel.set_yscale("log")
                plain_numbers(panel)
        axes[-1].set(xlabel=label)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2)
    return figure


def _has(cell: Any) -> bool:
    return cell is not None and cell["value"] is not None


def _draw(panel: Axes, points: list[Point], name: str, at: int) -> None:
    if not points:
        return
    places, values = [x for x, _ in points], [cell["value"] for _, cell in points]
    ends = [cell["interval"] or [cell["value"]] * 2 for _, cell in points]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    panel.errorbar(
        places,
        values,
        yerr=[below, above],
        marker=MARKERS[at % len(MARKERS)],
        color=PALETTE[at % len(PALETTE)],
        label=name,
    )


def _over_k(table: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[float, Any]]]]:
    original = [(0.0, line) for line in table["lines"] if line["attack"] == "none"]
    for mode in ("zero", "retain"):
        own = [line for line in table["lines"] if line["attack"].startswith(mode)]
        points = [(float(one["attack"].split(":")[1]), one) for one in own]
        random = [(k, one) for k, one in points if one["label"].endswith("random rows")]
        yield mode, [*(original if mode == "zero" else ()), *((k, one) for k, one in points if (k, one) not in random)]
        yield f"{mode}, random rows", random


def _over_p(table: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[float, Any]]]]:
    for scope in ("massive", "others", "all"):
        own = [line for line in _runs(table) if line["run"]["scope"] == scope]
        yield f"{scope} rows", [(_p0(line), line) for line in own if line["run"]["schedule"].startswith("constant")]


def _over_p0(table: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[float, Any]]]]:
    runs = [line for line in _runs(table) if line["run"]["schedule"] != "none"]
    kinds = dict.fromkeys(_kind(line) for line in runs)
    for kind in kinds:
        yield kind, [(_p0(line), line) for line in runs if _kind(line) == kind]


def _runs(table: Mapping[str, Any]) -> list[Any]:
    """Lines of fine-tuned models without an attack."""
    return [line for line in table["lines"] if line["run"] is not None and line["attack"] == "none"]


def _p0(line: Mapping[str, Any]) -> float:
    return float(re.split(r"[:,]", line["run"]["schedule"])[1])


def _kind(line: Mapping[str, Any]) -> str:
    return re.sub(r":[^,]*", "", line["run"]["schedule"]).replace(",alpha=", " ")


DRAWN = {
    "figure4": ("k, number of rows", _over_k),
    "figure6": ("p, constant over the run", _over_p),
    "table5": ("p0", _over_p0),
}
"""Table -> label of the horizontal axis, and the series."""
