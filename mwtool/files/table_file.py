"""Tables as files: LaTeX with booktabs, CSV, Markdown. One table of values gives all three."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.files.tabular import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column.

    key: of its values. heading: as people read it; CSV has the key. low, high: keys of the ends of an interval, which
    stands in brackets behind the value, and in CSV in columns of its own.
    """

    key: str
    heading: str
    low: str | None = None
    high: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that CSV has for it."""
        return tuple(key for key in (self.key, self.low, self.high) if key is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOfValues:
    """A table before it is written. rows: values by key: texts, numbers, booleans, lists of these, or None.

    label: short name, in letters and hyphens, for references to it.
    """

    caption: str
    label: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    def filled(self) -> TableOfValues:
        """Without the columns that are empty in every row."""
        used = {key for row in self.rows for key, value in row.items() if value is not None}
        kept = tuple(column for column in self.columns if used & {*column.keys})
        return TableOfValues(caption=self.caption, label=self.label, columns=kept, rows=self.rows)

    def numeric(self, column: Column) -> bool:
        """Whether a column has numbers alone, which stand on the right."""
        values = [row.get(column.key) for row in self.rows]
        return all(value is None or isinstance(value, int | float) for value in values)

    def cells(self, row: Mapping[str, Any]) -> Iterator[str]:
        """A row as people read it: four digits, an interval in brackets."""
        for column in self.columns:
            text = shown(row.get(column.key))
            ends = [row.get(key) for key in (column.low, column.high) if key is not None]
            yield f"{text} [{shown(ends[0])}, {shown(ends[1])}]" if text and ends and None not in ends else text


def check_table(path: Path) -> None:
    """Raise BadValue where the name of a file does not say what kind of table it is to be."""
    if path.suffix.lower() not in FORMATS:
        raise BadValue(
            f"{path}: tables are written as {', '.join(FORMATS)}, and this name ends in {path.suffix or 'none of them'}"
        )


def text_of_tables(tables: Sequence[TableOfValues], path: Path) -> str:
    """The tables in the format of the file they are to be written to.

    Raises BadValue for an unknown format, or for several tables in CSV, which has one header.
    """
    check_table(path)
    suffix = path.suffix.lower()
    if suffix == ".csv" and len(tables) > 1:
        raise BadValue(f"{path}: a CSV file has one table, and there are {len(tables)}; write them one by one")
    return "\n".join(FORMATS[suffix](table.filled()) for table in tables)


def csv_of(table: TableOfValues) -> str:
    """Values as they are, not rounded; a list with spaces between its entries, nothing for None. A row is a line."""
    out = io.StringIO()
    keys = [key for column in table.columns for key in column.keys]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([_raw(row.get(key)) for key in keys] for row in table.rows)
    return out.getvalue()


def _raw(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_raw, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else repr(value) if isinstance(value, float) else _one_line(str(value))


def markdown_of(table: TableOfValues) -> str:
    """A table as GitHub and MkDocs read it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_one_line(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |\n"

    rule = "|" + "".join("---:|" if table.numeric(column) else "---|" for column in table.columns) + "\n"
    head = line([column.heading for column in table.columns])
    return f"{_one_line(table.caption)}\n\n{head}{rule}" + "".join(line(list(table.cells(row))) for row in table.rows)


def latex_of(table: TableOfValues) -> str:
    """A floating table with booktabs' rules; every text is escaped."""
    numeric = [table.numeric(column) for column in table.columns]

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(map(escaped, cells)) + " \\\\\n"

    def values(row: Mapping[str, Any]) -> str:
        cells = (
            re.sub(r"-(?=\d)", "\N{MINUS SIGN}", cell) if number else cell
            for cell, number in zip(table.cells(row), numeric, strict=True)
        )
        return line(list(cells))

    shape = "".join("r" if number else "l" for number in numeric)
    return "".join(
        [
            "% needs \\usepackage{booktabs}\n",
            "\\begin{table}\n  \\centering\n",
            f"  \\caption{{{escaped(table.caption)}}}\n  \\label{{tab:{table.label}}}\n",
            f"  \\begin{{tabular}}{{{shape}}}\n    \\toprule\n",
            line([column.heading for column in table.columns]),
            "    \\midrule\n",
            *map(values, table.rows),
            "    \\bottomrule\n  \\end{tabular}\n\\end{table}\n",
        ]
    )


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"\ensuremath{\pm}",
    "\N{MINUS SIGN}": r"\ensuremath{-}",
    **{character: f"\\{character}" for character in "{}$&#%_"},
}


def escaped(text: str) -> str:
    """A text that LaTeX prints as it is. A bracket or star in front is kept from being read with the end of a line."""
    plain = "".join(_SPECIAL.get(character, character) for character in _one_line(text))
    return f"{{}}{plain}" if plain.startswith(("[", "*")) else plain


def _one_line(text: str) -> str:
    """Without what ends a line or is not printable."""
    return "".join(character if character.isprintable() else " " for character in text)


FORMATS: Mapping[str, Callable[[TableOfValues], str]] = {".tex": latex_of, ".csv": csv_of, ".md": markdown_of}
"""By the end of the file's name."""
