"""Results as tables outside the terminal: pandas frames, and HTML for notebooks. A table is a list of dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mwtool.errors import BadValue

Records = Sequence[Mapping[str, Any]]
"""The lines of a table; each has the same keys, which are its columns."""


def frame_of(records: Records) -> Any:
    """A pandas DataFrame. Raises BadValue where pandas is not installed."""
    if find_spec("pandas") is None:
        raise BadValue("to_frame needs pandas, which is not installed; run `pip install pandas`, or use to_dict")
    return import_module("pandas").DataFrame(list(records))


def html_of(title: str, records: Records) -> str:
    """A heading and a table as HTML, everything escaped."""
    if not records:
        return f"<p>{escape(title)}</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in records[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(shown(value))}</td>" for value in record.values()) + "</tr>"
        for record in records
    )
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: Any) -> str:
    """A value as a table shows it: four digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: PLR2004 # decimals of large numbers tell nothing
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)
