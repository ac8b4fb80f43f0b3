"""The files a command writes beside what it prints: the JSON document, its figure, HTML page and table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwtool.cli.options import WrongUsage


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where to write each; None: nowhere."""

    document: Path | None = None
    plot: Path | None = None
    report: Path | None = None
    table: Path | None = None

    def check(self) -> None:
        """Check, before the work begins, that each can be written. Raises OutputError, and WrongUsage for one path."""
        from mwtool.files.atomic_write import check_writable

        files = dict(self._given())
        for name, path in files.items():
            check_writable(path)
            same = next((other for other, one in files.items() if other != name and one == path), None)
            if same is not None:
                raise WrongUsage(f"{name} and {same} both name {path}; give each a file of its own")
        if self.plot is not None:
            from mwtool.files.figure import check_plottable

            check_plottable(self.plot)
        if self.table is not None:
            from mwtool.files.table_file import check_table

            check_table(self.table)

    def keep(self, text: str) -> None:
        """Write the document, which is done first: what was measured is not lost where a figure cannot be written."""
        if self.document is not None:
            from mwtool.files.atomic_write import write

            write(self.document, text)

    def draw(self, text: str) -> None:
        """Write table, figure and page of a document, from its text alone: as they are made later from the file."""
        document: dict[str, Any] = json.loads(text)
        if self.table is not None:
            from mwtool.files.atomic_write import write
            from mwtool.files.table_file import text_of_tables
            from mwtool.report.table import table_of

            write(self.table, text_of_tables([table_of(document)], self.table))
        if self.plot is not None:
            from mwtool.files.figure import save_figure
            from mwtool.report.plot import figure_of

            save_figure(figure_of(document), self.plot)
        if self.report is not None:
            from mwtool.files.atomic_write import write
            from mwtool.report.page import page_of

            write(self.report, page_of([document]))

    def _given(self) -> Iterator[tuple[str, Path]]:
        named = {"--output": self.document, "--plot": self.plot, "--report": self.report, "--table": self.table}
        yield from ((name, path) for name, path in named.items() if path is not None)
