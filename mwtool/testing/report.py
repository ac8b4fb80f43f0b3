"""Installed adapters, and how they pass the conformance kit, as tables for people, with Rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mwtool.architecture.registry import Plugin
    from mwtool.testing.kit import Conformance


def adapters_table(plugins: Sequence[Plugin]) -> Table:
    """Installed adapters: model type, the object that serves it, and the distribution it came with."""
    table = Table(box=None, pad_edge=False)
    for column in ("model type", "adapter", "distribution", "version"):
        table.add_column(column)
    for plugin in plugins:
        table.add_row(plugin.model_type, plugin.value, plugin.distribution, plugin.version)
    return table


def conformance_table(results: Sequence[Conformance]) -> Table:
    """One row a model type, one column a check; a check that was not tried is left empty."""
    table = Table(box=None, pad_edge=False)
    names = results[0].names if results else ()
    table.add_column("model type", no_wrap=True)
    for name in names:
        table.add_column(name, justify="center")
    table.add_column("from", overflow="fold")  # a distribution's name is never cut
    for result in results:
        marks = {check.name: Text("✓", "green") if check.passed else Text("✗", "bold red") for check in result.checks}
        table.add_row(result.model_type, *[marks.get(name, Text()) for name in names], result.source)
    return table
