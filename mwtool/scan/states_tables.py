"""Tables of what a scan found in whole texts: states by position, sink rates, triggers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.scan.tables import number, percent

if TYPE_CHECKING:
    from mwtool.scan.positions import Placement, Positions
    from mwtool.scan.sinks import Sinks
    from mwtool.scan.triggers import Triggers

WHERE = {
    "start": "bos at the start",
    "middle": "bos in the middle",
    "end": "bos at the end",
    "absent": "without bos",
}
LISTED = 12
"""Tokens and dimensions that a table of triggers has lines for."""


def positions_table(found: Positions) -> RenderableType:
    """A line a position: the largest entry of both states, and the attention the position receives."""
    title = f"\nLayer {found.layer} by position: residual stream h after it, intermediate state z, attention received"
    parts: list[RenderableType] = [Text(title, "bold")]
    for one in found.placements:
        parts.append(Text(f"{WHERE[one.where]}"))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("position", "token", "max |h|", "dim", "median", "max |z|", "row", "before", "after"):
            table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
        for at, cells in enumerate(_lines(one)):
            table.add_row(*cells, style="bold yellow" if at == one.at else None)
        parts.append(table)
    legend = "before, after: mean attention of the positions that see it, over the heads of the layers up to this one "
    return Group(*parts, Text(f"{legend}and of those after it.", "dim"))


def _lines(one: Placement) -> Iterator[list[str]]:
    for at, token in enumerate(one.tokens):
        (dim, h), (row, z) = one.hidden[at].top[0], one.intermediate[at].top[0]
        received = ["" if part is None else f"{part[at]:.2f}" for part in (one.before, one.after)]
        middle = number(one.hidden[at].median)
        yield [str(at), repr(token)[1:-1], number(abs(h)), str(dim), middle, number(abs(z)), str(row), *received]


def sinks_table(found: Sinks, massive: int | None) -> RenderableType:
    """A line a layer: its sink rate, how many heads are sinks, and the head that pays the first token most.

    massive: the massive layer, which is marked.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "sink rate", "heads in most windows", "largest score", "head"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.layers:
        head = max(range(len(one.scores)), key=lambda at: one.scores[at])
        often = sum(rate > 0.5 for rate in one.rates)  # noqa: PLR2004 # more often than not
        cells = (
            str(one.layer),
            percent(one.rate),
            f"{often} of {len(one.rates)}",
            f"{one.scores[head]:.3f}",
            str(head),
        )
        table.add_row(*cells, style="bold yellow" if one.layer == massive else None)
    title = (
        f"\nAttention sinks: {percent(found.rate)} of heads pay the first token more than {found.eps:g} of their "
        f"attention ({found.windows} windows of {found.length} tokens of {found.text})"
    )
    return Group(Text(title, "bold"), table)


def triggers_table(found: Triggers) -> RenderableType:
    """The tokens and dimensions that are massive most often."""
    read = f"{found.windows} window{'s' if found.windows > 1 else ''} of {found.length} tokens of {found.text}"
    if not found.massive:
        return Text(f"\nTriggers: no position of {read} has a massive state.")
    title = f"\nTriggers: {found.massive:,} of {found.windows * found.length:,} positions are massive in {read}"
    where = f"{found.first} of them at the first position, {found.massive - found.first} elsewhere; dimensions "
    named = ", ".join(f"{d} ({count:,})" for d, count in found.dimensions[:LISTED])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("token", "id", "seen", "massive", "at first position", "largest h", "dim", "layer"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    for one in found.tokens[:LISTED]:
        counts = (f"{one.id}", f"{one.seen:,}", f"{one.massive:,}", f"{one.first:,}")
        table.add_row(repr(one.token)[1:-1], *counts, number(one.value), str(one.dimension), str(one.layer))
    rest = len(found.tokens) - LISTED
    more = [Text(f"and {rest:,} more tokens", "dim")] if rest > 0 else []
    dimensions = "" if len(found.dimensions) <= LISTED else f" and {len(found.dimensions) - LISTED} more"
    return Group(Text(title, "bold"), Text(f"{where}{named}{dimensions}"), table, *more)
