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
mwtool report ablation.json --table table.tex
"""


def report(
    documents: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE ...", help="JSON documents of one model that mwtool wrote with -o, or folders of them."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The HTML page to write.",
            show_default="report.html; no page with --table alone",
        ),
    ] = None,
    table: options.TableFile = None,
    debug: options.Debug = False,
) -> None:
    """Gather what was measured of one model in one HTML page."""
    from mwtool.cli.outputs import Outputs
    from mwtool.cli.terminal import note
    from mwtool.files.atomic_write import write
    from mwtool.report.page import page_of, read_for_page

    page = Path("report.html") if output is None and table is None else output
    Outputs(page, table=table).check()
    found = read_for_page(documents)
    if page is not None:
        write(page, page_of(list(found.values()), list(found)))
        note(f"the report is in {page}")
    if table is not None:
        from mwtool.files.table_file import text_of_tables
        from mwtool.report.table import table_of

        write(table, text_of_tables([table_of(document) for document in found.values()], table))
        note(f"the tables are in {table}" if len(found) > 1 else f"the table is in {table}")


app = single()
app.command("report", cls=Command, epilog=EXAMPLES)(report)
