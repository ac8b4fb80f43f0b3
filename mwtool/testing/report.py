"""Installed adapters and the results of the conformance checks as Rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mwtool.architecture.registry import Plugin
    from mwtool.testing.kit import Conformance


def adapters_table(plugins: Sequence[Plugin]) -> Table:
    """Installed adapters: model type, adapter object, and the distribution that provides it."""
    table = Table(box=None, pad_edge=False)
    for column in ("model type", "adapter", "distribution", "version"):
        table.add_column(column)
    for plugin in plugins:
        table.add_row(plugin.model_type, plugin.value, plugin.distribution, plugin.version)
    return table


def conformance_table(results: Sequence[Conformance]) -> Table:
    """One line for each model type, one column for each check; a check that was not run is left empty."""
    table = Table(box=None, pad_edge=False)
    names = results[0].names if results else ()
    table.add_column("model type", no_wrap=True)
    for name in names:
        table.add_column(name, justify="center")
    table.add_column("from", overflow="fold")  # never truncates the name of a distribution
    for result in results:
        marks = {check.name: Text("✓", "green") if check.passed else Text("✗", "bold red") for check in result.checks}
        table.add_row(result.model_type, *[marks.get(name, Text()) for name in names], result.source)
    return table
