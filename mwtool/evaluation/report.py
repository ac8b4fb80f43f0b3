"""An evaluation as text for people, with Rich: model x attack x task, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mwtool.evaluation.comparison import Paired, Row, beside_first
from mwtool.evaluation.numbers import figure, fine, short

SHOWN = 5
"""Prompts whose answers are shown before the rest is left to the document."""


def eval_report(rows: Sequence[Row]) -> RenderableType:
    """A line for each figure, beside the first of its kind where there are several; then the answers."""
    parts: list[RenderableType] = [_table([row for row in rows if not row.measured.answers])]
    parts += _answers([row for row in rows if row.measured.answers])
    return Group(*parts)


def _table(rows: Sequence[Row]) -> RenderableType:
    if not rows:
        return Text()
    several, attacked = len({row.model for row in rows}) > 1, len({row.attack for row in rows}) > 1
    beside = {id(row): found for row, _, found in beside_first(rows)}
    parts = any(row.measured.part for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", *(["of it"] if parts else []), "metric", *(["model"] if several else []), "attack"):
        table.add_column(name, overflow="fold")
    for name in ("value", "± s.e.", "n", *(["beside the first"] if several or attacked else [])):
        table.add_column(name, justify="right", no_wrap=name != "beside the first")
    for row in sorted(rows, key=lambda row: [one.key for one in rows].index(row.key)):
        one = row.measured
        cells = [short(one.task), *([one.part or ""] if parts else []), one.metric]
        cells += [*([row.model] if several else []), row.attack, _value(row), _error(row), f"{one.n:,}"]
        table.add_row(
            *cells, *([_beside(beside.get(id(row)), first=id(row) not in beside)] if several or attacked else [])
        )
    return table


def _answers(rows: Sequence[Row]) -> Iterator[RenderableType]:
    """For each of the first prompts, what each variant says after it."""
    for task in dict.fromkeys(row.measured.task for row in rows):
        same = [row for row in rows if row.measured.task == task]
        for row in same:
            if row.measured.nonfinite:
                yield Text(f"\n{short(task)}, {_name(row, same)}: {row.measured.nonfinite}")
        prompts = same[0].measured.setting["prompts"]
        for at, prompt in enumerate(prompts[:SHOWN]):
            grid = Table.grid(expand=True, padding=(0, 1))
            for _ in same:
                grid.add_column(ratio=1)
            grid.add_row(*(Panel(Text(row.measured.answers[at]), title=Text(_name(row, same))) for row in same))
            yield Group(Text(f"\n{short(task)}, prompt {at + 1}: {prompt}"), grid)
        if len(prompts) > SHOWN:
            yield Text(f"\n{len(prompts) - SHOWN} more prompts: their answers are in the document (-o FILE)")


def _name(row: Row, beside: Sequence[Row]) -> str:
    return row.attack if len({one.model for one in beside}) == 1 else f"{row.model}, {row.attack}"


def _value(row: Row) -> str:
    one = row.measured
    if one.nonfinite or not math.isfinite(one.value):
        return "not finite"
    return _percent(one.value) if _accuracy(row) else figure(one.value)


def _error(row: Row) -> str:
    if row.measured.stderr is None:
        return ""
    return _percent(row.measured.stderr) if _accuracy(row) else figure(row.measured.stderr)


def _beside(found: Paired | None, *, first: bool) -> str:
    if found is None:
        return "" if first else "other examples"
    shape = {"ratio": "x{}", "points": "{:+.1f}", "difference": "{:+.3g}"}[found.kind]
    if found.kind == "ratio":
        value, ends = shape.format(fine(found.value)), [found.low, found.high]
        return value + ("" if None in ends else f" [{fine(ends[0] or 0)}, {fine(ends[1] or 0)}]")
    interval = (
        "" if found.low is None or found.high is None else f" [{shape.format(found.low)}, {shape.format(found.high)}]"
    )
    return shape.format(found.value) + interval


def _accuracy(row: Row) -> bool:
    """Whether it is a share of examples, shown in percent."""
    one = row.measured
    return one.weights is None and bool(one.samples) and all(value in (0, 1) for value in one.samples)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
