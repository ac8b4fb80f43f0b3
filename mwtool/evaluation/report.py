"""The report of an evaluation, with Rich: a table of model x attack x task, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mwtool.evaluation.comparison import Entry, Paired, compare_with_first, is_accuracy, is_number
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.numbers import figure, fine, short
from mwtool.evaluation.task_mean import compared_means

SHOWN = 5
"""How many prompts are shown with their answers; the document has them all."""


def eval_report(entries: Sequence[Entry]) -> RenderableType:
    """A table with one line for each metric, compared with the first of its kind, followed by the answers."""
    parts: list[RenderableType] = [_table([entry for entry in entries if is_number(entry.measured)])]
    parts += _answers([entry for entry in entries if entry.measured.answers])
    return Group(*parts)


def _table(entries: Sequence[Entry]) -> RenderableType:
    if not entries:
        return Text()
    several, attacked = len({entry.model for entry in entries}) > 1, len({entry.attack for entry in entries}) > 1
    beside = {id(entry): found for entry, _, found in compare_with_first(entries)}
    parts = any(entry.measured.part for entry in entries)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", *(["subtask"] if parts else []), "metric", *(["model"] if several else []), "attack"):
        table.add_column(name, overflow="fold")
    for name in ("value", "± s.e.", "n", *(["vs first"] if several or attacked else [])):
        table.add_column(name, justify="right", no_wrap=name != "vs first")
    for entry in sorted(entries, key=lambda entry: [one.key for one in entries].index(entry.key)):
        one = entry.measured
        cells = [short(one.task), *([one.part or ""] if parts else []), one.metric]
        cells += [*([entry.model] if several else []), entry.attack, _value(entry), _error(entry), f"{one.n:,}"]
        table.add_row(
            *cells, *([_beside(beside.get(id(entry)), first=id(entry) not in beside)] if several or attacked else [])
        )
    for model, attack, mean, reference in compared_means(entries):
        cells = [f"mean of {len(mean.tasks)} tasks", *([""] if parts else []), mean.metric]
        cells += [*([model] if several else []), attack, _percent(mean.value)]
        cells += ["" if mean.stderr is None else _percent(mean.stderr), ""]
        change = "" if reference is None else _beside(mean.beside(reference), first=False)
        table.add_row(*cells, *([change] if several or attacked else []))
    return table


def _answers(entries: Sequence[Entry]) -> Iterator[RenderableType]:
    """The answers of each variant to each of the first prompts, side by side."""
    for key in dict.fromkeys(entry.key for entry in entries):
        same = [entry for entry in entries if entry.key == key]
        task = " ".join(filter(None, (short(key[0]), key[1])))
        for entry in same:
            if (unscored := _unscored(entry.measured)) is not None:
                yield Text(f"\n{task}, {_name(entry, same)}: {unscored}")
            if entry.measured.nonfinite:
                yield Text(f"\n{task}, {_name(entry, same)}: {entry.measured.nonfinite}")
        prompts = same[0].measured.setting["prompts"]
        for at, prompt in enumerate(prompts[:SHOWN]):
            grid = Table.grid(expand=True, padding=(0, 1))
            for _ in same:
                grid.add_column(ratio=1)
            grid.add_row(*(Panel(Text(entry.measured.answers[at]), title=Text(_name(entry, same))) for entry in same))
            yield Group(Text(f"\n{task}, prompt {at + 1}: {prompt}"), grid)
        if len(prompts) > SHOWN:
            yield Text(f"\n{len(prompts) - SHOWN} more prompts; -o FILE writes the answers to all of them")


def _unscored(one: Measured) -> str | None:
    """How many verdicts of a judge have no score, if some have none."""
    refused, unreadable = one.setting.get("refused", 0), one.setting.get("unreadable", 0)
    if not refused + unreadable:
        return None
    return f"{refused + unreadable} verdicts have no score ({refused} refused, {unreadable} unreadable)"


def _name(entry: Entry, beside: Sequence[Entry]) -> str:
    return entry.attack if len({one.model for one in beside}) == 1 else f"{entry.model}, {entry.attack}"


def _value(entry: Entry) -> str:
    one = entry.measured
    if one.nonfinite or not math.isfinite(one.value):
        return "not finite"
    return _percent(one.value) if is_accuracy(entry.measured) else figure(one.value)


def _error(entry: Entry) -> str:
    if entry.measured.stderr is None:
        return ""
    return _percent(entry.measured.stderr) if is_accuracy(entry.measured) else figure(entry.measured.stderr)


def _beside(found: Paired | None, *, first: bool) -> str:
    if found is None:
        return "" if first else "different examples"
    shape = {"ratio": "x{}", "points": "{:+.1f}", "difference": "{:+.3g}"}[found.kind]
    if found.kind == "ratio":
        value, ends = shape.format(fine(found.value)), [found.low, found.high]
        return value + ("" if None in ends else f" [{fine(ends[0] or 0)}, {fine(ends[1] or 0)}]")
    interval = (
        "" if found.low is None or found.high is None else f" [{shape.format(found.low)}, {shape.format(found.high)}]"
    )
    return shape.format(found.value) + interval


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
