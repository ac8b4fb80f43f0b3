"""The files a command writes beside what it prints: the JSON document, its figure, and its HTML page."""

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

    def keep(self, text: str) -> None:
        """Write the document, which is done first: what was measured is not lost where a figure cannot be written."""
        if self.document is not None:
            from mwtool.files.atomic_write import write

            write(self.document, text)

    def draw(self, text: str) -> None:
        """Write figure and page of a document, from its text alone: as they are drawn later from the file."""
        document: dict[str, Any] = json.loads(text)
        if self.plot is not None:
            from mwtool.files.figure import save_figure
            from mwtool.report.plot import figure_of

            save_figure(figure_of(document), self.plot)
        if self.report is not None:
            from mwtool.files.atomic_write import write
            from mwtool.report.page import page_of

            write(self.report, page_of([document]))

    def _given(self) -> Iterator[tuple[str, Path]]:
        for name, path in (("--output", self.document), ("--plot", self.plot), ("--report", self.report)):
            if path is not None:
                yield name, path
