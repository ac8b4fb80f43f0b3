"""Tables as files: what is in them can be read back, whatever the texts are."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mwtool.errors import BadValue
from mwtool.files.table_file import Column, TableOfValues, check_table, csv_of, escaped, latex_of, text_of_tables

COLUMNS = (
    Column(key="name", heading="name"),
    Column(key="ratio", heading="50% & more_or_less", low="low", high="high"),
    Column(key="empty", heading="never"),
)


def table(*rows: dict[str, Any], caption: str = "A table") -> TableOfValues:
    return TableOfValues(caption=caption, label="t", columns=COLUMNS, rows=rows)


def written(one: TableOfValues, suffix: str) -> str:
    return text_of_tables([one], Path(f"table{suffix}"))


def one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


VALUES = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12))


@given(st.lists(st.tuples(st.text(), VALUES, VALUES, VALUES), min_size=1))
def test_csv_gives_back_every_value_with_the_bounds_in_columns_of_their_own(rows: list[Any]) -> None:
    text = csv_of(table(*({"name": a, "ratio": b, "low": c, "high": d} for a, b, c, d in rows)))
    head, *found = csv.reader(io.StringIO(text, newline=""))
    assert head == ["name", "ratio", "low", "high", "empty"]
    for (name, *values), cells in zip(rows, found, strict=True):
        assert cells[0] == one_line(name)
        for value, cell in zip(values, cells[1:4], strict=True):
            assert (cell == "") if value is None else float(cell) == value


BACK = {
    r"\textbackslash{}": "\\",
    r"\textasciicircum{}": "^",
    r"\textasciitilde{}": "~",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textquotedbl{}": '"',
    r"\ensuremath{\pm}": "±",
    r"\ensuremath{-}": "\N{MINUS SIGN}",
    **{f"\\{character}": character for character in "{}$&#%_"},
}
TOKENS = re.compile("|".join(map(re.escape, sorted(BACK, key=len, reverse=True))))


@given(st.text())
def test_what_latex_prints_is_the_text_and_nothing_in_it_is_a_command(text: str) -> None:
    plain = one_line(text)
    made = escaped(text)
    made = made[2:] if plain.startswith(("[", "*")) else made
    assert TOKENS.sub(lambda found: BACK[found[0]], made) == plain
    assert not set(TOKENS.sub("", made)) & set('\\{}$&#%_^~<>|"')


@given(st.text(), st.text(), VALUES)
def test_a_row_of_latex_and_of_markdown_has_a_cell_a_column(caption: str, name: str, value: Any) -> None:
    made = table({"name": name, "ratio": value, "low": 1.0, "high": 2.0}, caption=caption)
    columns = len(made.filled().columns)
    lines = written(made, ".tex").splitlines()
    body = [line for line in lines if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line.replace(r"\\", ""))) for line in body] == [columns - 1] * 2
    assert [line.strip() for line in lines if "rule" in line] == ["\\toprule", "\\midrule", "\\bottomrule"]
    rows = [line for line in written(made, ".md").splitlines() if line.startswith("| ")][-2:]
    assert [len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in rows] == [columns + 1] * 2


def test_people_read_four_digits_with_an_interval_and_no_empty_columns() -> None:
    made = table({"name": "a|b_c", "ratio": -1.23456, "low": -2.0, "high": 1e5}, {"name": "d", "ratio": None})
    text = written(made, ".tex")
    assert r"a\textbar{}b\_c & \ensuremath{-}1.235 [\ensuremath{-}2, 100,000] \\" in text
    assert r"name & 50\% \& more\_or\_less \\" in text
    assert "{lr}" in text
    assert "never" not in text
    assert "| a\\|b_c | -1.235 [-2, 100,000] |\n| d |  |\n" in written(made, ".md")
    assert "|---|---:|" in written(made, ".md")
    assert written(made, ".csv") == "name,ratio,low,high\na|b_c,-1.23456,-2.0,100000.0\nd,,,\n"


def test_several_tables_are_one_file_but_in_csv() -> None:
    both = [table({"name": "a"}), table({"name": "b"})]
    assert text_of_tables(both, Path("t.TEX")).count(r"\begin{table}") == 2
    with pytest.raises(BadValue, match=r"t.csv: a CSV file has one table, and there are 2; write them one by one"):
        text_of_tables(both, Path("t.csv"))


@pytest.mark.parametrize("name", ["table", "table.doc", "table.tex.gz"])
def test_other_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadValue, match=rf"{name}: tables are written as .tex, .csv, .md, and this name ends in"):
        check_table(Path(name))


def test_a_line_never_begins_with_what_belongs_to_the_one_before() -> None:
    """LaTeX reads `[` and `*` behind a line's end as its options, over line breaks."""
    assert r"{}[x] &" in latex_of(table({"name": "[x]"}))
    assert r"{}*x &" in latex_of(table({"name": "*x"}))
