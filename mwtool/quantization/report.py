"""A quantization check as text for people, with Rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.evaluation.numbers import short, shown
from mwtool.quantization.rounding import LEVELS

if TYPE_CHECKING:
    from mwtool.evaluation.measurement import Measured
    from mwtool.quantization.check import QuantizeCheck, Variant


def quantize_report(found: QuantizeCheck) -> RenderableType:
    """A table for each scheme, one line for each set of protected weights, then the verdicts."""
    return Group(*_parts(found))


def _parts(found: QuantizeCheck) -> Iterator[RenderableType]:
    values = ", ".join(f"{short(one.task)} {shown(one)}" for one in found.baseline)
    method = f"{found.weights:,} weights quantized by round to nearest, {LEVELS[found.plan.levels]}."
    yield Text(f"{method} In full precision: {values}\n")
    for scheme in found.plan.schemes:
        yield Text(str(scheme), "bold")
        yield _table([one for one in found.variants if one.scheme == scheme], found.baseline)
        yield Text()
    for verdict in found.verdicts:
        yield Text(verdict)


def _table(variants: Sequence[Variant], baseline: Sequence[Measured]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kept in full precision", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for one in baseline:
        table.add_column(short(one.task), justify="right", no_wrap=True)
        if one.weights is not None:
            table.add_column("given back", justify="right", no_wrap=True)
    for variant in variants:
        name = "nothing" if variant.protection is None else variant.protection.name
        cells = []
        for at, one in enumerate(variant.measured):
            cells += [shown(one), *([str(variant.back[at] or "")] if baseline[at].weights is not None else [])]
        style = "dim" if variant.protection is not None and variant.protection.control else None
        table.add_row(name, "" if variant.protection is None else f"{variant.bytes:,}", *cells, style=style)
    return table
