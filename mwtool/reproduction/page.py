"""The page of a study: its tables in Markdown, each cell with its interval, each line with the commands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mwtool.evaluation.numbers import fine
from mwtool.files.figure import model_name

Document = Mapping[str, Any]


def page_of(document: Document, figures: Sequence[str]) -> str:
    """The page. figures: names of figures beside it, which begin with the name of their table."""
    lines = [f"# The study of massive weights, repeated on {model_name(document)}", "", *_head(document), ""]
    for table in document["tables"]:
        lines += [f"## {table['title']}", "", *_table(table), ""]
        lines += [line for name in figures if name.startswith(table["name"]) for line in (f"![{name}]({name})", "")]
        lines += [*_commands(table), ""]
    if document["failures"]:
        lines += ["## What failed", ""]
        lines += [f"- {one['step']}: {one['error']} (`{one['command']}`)" for one in document["failures"]] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _head(document: Document) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield f"{document['dtype']} on {document['device']}; written by mwtool {document['mwtool_version']}, {versions}."
    if document["command"]:
        yield f"The command: `{document['command']}`."
    if not document["complete"]:
        yield "This study is not complete."
    yield ""
    scan = document["scan"]
    if scan is not None and scan["massive"] is None:
        yield f"The scan found no massive weights ({scan['absence']}), so nothing is attacked and nothing is dropped."
    elif scan is not None:
        one = scan["massive"]
        yield f"Layer {one['layer']} is the massive layer; rows {', '.join(map(str, one['indices']))}."
    yield from ((scan or {}).get("check") or {}).get("conclusion", ())
    yield ""
    training = document["settings"]["training"]
    yield "Fine-tuning: " + ", ".join(f"{name} {value}" for name, value in training.items() if value is not None) + "."
    yield ""
    for note in document["notes"]:
        yield f"- {note}"


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    if not table["lines"]:
        yield "Not measured."
    else:
        columns = [column["name"] for column in table["columns"]]
        yield "| | " + " | ".join(columns) + " | beside |"
        yield "|---|" + "---|" * (len(columns) + 1)
        for line in table["lines"]:
            cells = [page_cell(line["cells"].get(name)) for name in columns]
            yield f"| {line['label']} | " + " | ".join(cells) + f" | {line['beside'] or ''} |"
    if table["state"] == "partial":
        yield "\nThis table is not complete."
    for note in table["notes"]:
        yield f"\n{note[:1].upper()}{note[1:]}."


def page_cell(cell: Mapping[str, Any] | None) -> str:
    """The value with its interval; below it the change with its own; how many seeds, where there are several."""
    if cell is None:
        return ""
    if cell["value"] is None:
        return f"not finite: {cell['nonfinite']}"
    text = _number(cell["value"]) + _interval(cell["interval"])
    change = cell["change"]
    if change is not None and change["kind"] == "ratio":
        text += f"<br>x{_number(change['value'])}{_interval(change['interval'])}"
    elif change is not None:
        text += f"<br>{change['value']:+.2f}{_points(change['interval'])}"
    kind = "draws" if cell["over"] == "draws" else "seeds"
    return text + (f"<br>{len(cell['seeds'])} {kind}" if len(cell["seeds"]) > 1 else "")


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{_number(interval[0])}, {_number(interval[1])}]"


def _points(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _number(value: float) -> str:
    return fine(value) if abs(value) < 10 else f"{value:,.1f}"  # noqa: PLR2004 - three digits


def _commands(table: Mapping[str, Any]) -> Iterator[str]:
    """The commands of each line with the first seed, each command once."""
    if not table["lines"]:
        return
    yield "<details><summary>Commands, of the first seed; for another, change --seed and the folder</summary>"
    yield ""
    said: set[str] = set()
    for line in table["lines"]:
        new = [command for command in line["commands"] if command not in said]
        said.update(new)
        if new:
            yield f"{line['label']}:"
            yield from ("", "```sh", *new, "```", "")
    yield "</details>"
