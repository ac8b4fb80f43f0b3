"""`mwtool report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mwtool.cli import options
from mwtool.cli.command import Command
from mwtool.cli.commands import single

EXAMPLES = """\
mwtool report scan.json ablation.json -o report.html
mwtool report results -o report.html     # every document in a folder
"""


def report(
    documents: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE ...", help="JSON documents of one model that mwtool wrote with -o, or folders of them."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML page to write.")] = Path(
        "report.html"
    ),
    debug: options.Debug = False,
) -> None:
    """Gather what was measured of one model in one HTML page."""
    from mwtool.cli.terminal import note
    from mwtool.files.atomic_write import check_writable, write
    from mwtool.report.page import page_of, read_for_page

    check_writable(output)
    found = read_for_page(documents)
    write(output, page_of(list(found.values()), list(found)))
    note(f"the report is in {output}")


app = single()
app.command("report", cls=Command, epilog=EXAMPLES)(report)
