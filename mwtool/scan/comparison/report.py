"""A comparison of two scans as text for people, with Rich; everything fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.scan.report import sparkline
from mwtool.scan.tables import number

if TYPE_CHECKING:
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.scan.comparison.compare import ComparedDimension, ComparedEvent, ComparedRow, Comparison, Summary

SHOWN = 3
"""Dimensions whose levels are drawn, those of the largest values."""
NAMED = 3
"""Rows of an event that are named in its line."""


def compare_report(found: Comparison, width: int, *, every: bool = False) -> RenderableType:
    """The report of a comparison. width: columns of the terminal; every: name all rows of all events."""
    return Group(*_parts(found, width, every=every))


def _parts(found: Comparison, width: int, *, every: bool) -> Iterator[RenderableType]:
    yield _summaries(found)
    if found.dimensions:
        yield _levels(found.dimensions, width)
    if found.events:
        yield Text()
        yield _events(found, every=every)
        yield Text("rows: those that carry the write (90 % of it), in A or B.", "dim")
    if found.massive:
        yield Text()
        yield _rows(found.massive)
    yield Text()
    for sentence in found.said:
        yield Text(sentence)


def _summaries(found: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("A", overflow="fold")
    table.add_column("B", overflow="fold")
    for name, one, other in zip(_LINES, _facts(found.a, found.scan_a), _facts(found.b, found.scan_b), strict=True):
        table.add_row(name, one, other)
    return table


_LINES = ["model", "type", "shape", "precision", "massive layer", "rows that carry it", "largest |z|", "largest |h|"]
_LINES += ["events", "super weights"]


def _facts(one: Summary, scan: ScanDocument) -> tuple[str, ...]:
    """A value for each of `_LINES`."""
    shape = scan.shape
    experts = "" if shape.experts is None else f", {shape.experts} experts"
    over = "" if one.over_median is None else f" ({one.over_median:,.0f} x median)"
    peak = "none massive" if one.peak is None else f"{number(one.peak)} (layer {one.peak_layer})"
    return (
        one.name,
        scan.model_type,
        f"{shape.layers} x {shape.hidden_size:,}, FFN {shape.intermediate_size:,}{experts}",
        scan.dtype,
        "none" if one.layer is None else str(one.layer),
        "" if one.count is None else str(one.count),
        "" if one.z is None else f"{number(one.z)}{over}",
        peak,
        str(one.events),
        str(one.super_weights),
    )


def _levels(dimensions: Sequence[ComparedDimension], width: int) -> Text:
    """|h_l[d]| of both scans, a character a layer, on one log scale."""
    largest = max(map(_peak, dimensions))
    shown = sorted(dimensions, key=_peak, reverse=True)[:SHOWN]
    text = Text("\n|h| after each layer, log scale\n", "dim")
    for one in shown:
        for name, values in (("A", one.values_a), ("B", one.values_b)):
            line = (
                "not massive" if values is None else sparkline([abs(v) for v in values], largest, max(width - 40, 20))
            )
            text.append(f"dimension {one.dimension:<5} {name} {line}\n")
    text.rstrip()
    return text


def _peak(one: ComparedDimension) -> float:
    return max((abs(value) for values in (one.values_a, one.values_b) if values for value in values), default=0.0)


def _events(found: Comparison, *, every: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("layer", "dim"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("event in", no_wrap=True)
    for name in ("h after A", "h after B", "|z| A", "|z| B"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rows", overflow="fold")
    for event in found.events:
        where = {"both": "both", "a": "A only", "b": "B only"}[event.found_in]
        cells = [str(event.layer), str(event.dimension), where]
        cells += [_number(value) for value in (event.after_a, event.after_b, event.z_a, event.z_b)]
        table.add_row(*cells, _named(event, every=every), style=_style(found, event))
    return table


def _style(found: Comparison, event: ComparedEvent) -> str | None:
    return "bold yellow" if event.layer in (found.a.layer, found.b.layer) else None


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _named(event: ComparedEvent, *, every: bool) -> str:
    """Rows by what became of them; without a second event there is nothing to match them with."""
    if event.found_in != "both":
        return ""
    parts = []
    for fate in ("kept", "moved", "lost", "new"):
        rows = [_name(row) for row in event.rows if row.fate == fate]
        if rows:
            listed = rows if every or len(rows) <= NAMED else [*rows[: NAMED - 1], f"{len(rows) - NAMED + 1} more"]
            parts.append(f"{fate} {', '.join(listed)}")
    return "; ".join(parts)


def _name(row: ComparedRow) -> str:
    return str(row.row) if row.expert is None else f"e{row.expert}:{row.row}"


def _rows(rows: Sequence[ComparedRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("row", "rank A", "rank B", "|z| A", "|z| B", "share A", "share B"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        ranks = ["-" if rank is None else str(rank) for rank in (row.rank_a, row.rank_b)]
        shares = ["" if share is None else f"{share:.1%}" for share in (row.share_a, row.share_b)]
        table.add_row(_name(row), *ranks, _number(row.z_a), _number(row.z_b), *shares, row.fate)
    return table
