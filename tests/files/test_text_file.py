"""Files that people make, as training and evaluation read them: with a byte order mark, or with what is no line end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mwtool.errors import BadValue
from mwtool.evaluation.corpora import text_for
from mwtool.evaluation.tasks import read_cloze, read_prompts
from mwtool.files.text import read_lines, read_text
from mwtool.finetune.data import read_data

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_part_of_no_text_and_no_row(tmp_path: Path) -> None:
    row = {"context": "a", "continuation": "b", "text": "c"}
    (tmp_path / "rows.jsonl").write_bytes(MARK + json.dumps(row).encode())
    (tmp_path / "book.txt").write_bytes(MARK + b"once\r\nupon")
    assert read_cloze(tmp_path / "rows.jsonl")[0].context == "a"
    assert read_data(str(tmp_path / "rows.jsonl")).examples[0].text == "c"
    assert text_for(str(tmp_path / "book.txt")).documents == ("once\nupon",)
    assert read_prompts(tmp_path / "book.txt") == ("once", "upon")
    assert read_data(str(tmp_path / "book.txt")).examples[0].text == "once\nupon"


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "book.txt"])
def test_a_file_of_nothing_but_a_byte_order_mark_is_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(MARK)
    with pytest.raises(BadValue, match=f"{name} is empty; expected text or records to train on"):
        read_data(str(tmp_path / name))
    with pytest.raises(BadValue, match=f"{name} is empty; expected text$"):
        read_text(tmp_path / name)


def test_lines_end_with_a_line_feed_alone_and_are_numbered_as_editors_do(tmp_path: Path) -> None:
    """Other ends of lines that Unicode knows are written as they are within JSON."""
    path = tmp_path / "rows.jsonl"
    rows = [{"context": f"one{end}two", "continuation": "x"} for end in "\u2028\u2029\x85"]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [one.context for one in read_cloze(path)] == [row["context"] for row in rows]
    assert [where for where, _ in read_lines(path)] == [f"{path}, line {number}" for number in (1, 3, 5)]


def test_json_that_is_nested_without_end_is_a_failure_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' * 100_000)
    with pytest.raises(BadValue, match=r"line 1: not JSON .* expected one JSON object a line"):
        read_cloze(path)
    with pytest.raises(BadValue, match=r"line 1: not JSON .* expected one JSON object a line"):
        read_data(str(path))
