"""Training data in every form, and what is said of rows that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mwtool.errors import BadValue, ModelNotFound
from mwtool.finetune.data import read_data
from mwtool.finetune.records import Example, Turn

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello."},
    {"instruction": "Part.", "output": "Bye."},
]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
TALK += [{"role": "assistant", "content": "Hello"}]


def written(folder: Path, rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    lines = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if name.endswith(("jsonl", "txt")) or isinstance(rows, str) else json.dumps(rows, indent=1))
    return str(path)


def turns(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.turns]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_alpaca_rows_become_a_question_and_an_answer(tmp_path: Path, name: str) -> None:
    data = read_data(written(tmp_path, ALPACA, name))
    assert data.form == "alpaca"
    assert [turns(one) for one in data.examples] == [
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
        [("user", "Greet."), ("assistant", "Hello.")],
        [("user", "Part."), ("assistant", "Bye.")],
    ]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_messages_keep_their_roles_under_either_name(tmp_path: Path, key: str) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = [{"from": names[one["role"]], "value": one["content"]} for one in TALK]
    data = read_data(written(tmp_path, [{key: TALK if key == "messages" else other}]))
    assert data.form == "messages"
    assert turns(data.examples[0]) == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]


def test_rows_of_text_are_examples_and_a_text_file_is_one_stream(tmp_path: Path) -> None:
    rows = read_data(written(tmp_path, [{"text": "one"}, {"text": "two\u2028still two"}]))
    assert [one.text for one in rows.examples] == ["one", "two\u2028still two"]
    assert (rows.form, rows.stream) == ("text", False)
    whole = read_data(written(tmp_path, "one\ntwo", "book.txt"))
    assert ([one.text for one in whole.examples], whole.stream) == (["one\ntwo"], True)


def test_parquet_and_a_folder_of_files_give_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional library")
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list([{**row, "input": row.get("input")} for row in ALPACA]).to_parquet(
        tmp_path / "folder" / "rows.parquet"
    )
    expected = [turns(one) for one in read_data(written(tmp_path, ALPACA)).examples]
    parquet = read_data(str(tmp_path / "folder" / "rows.parquet"))
    assert [turns(one) for one in parquet.examples] == expected
    assert parquet.examples[1].where.endswith("rows.parquet, record 2")
    assert [turns(one) for one in read_data(str(tmp_path / "folder")).examples] == expected
    with pytest.raises(ModelNotFound, match="split test"):
        read_data(str(tmp_path / "folder"), split="test")


def test_what_is_no_parquet_file_is_said_to_be_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="an optional library")
    with pytest.raises(BadValue, match="cannot be read as Parquet"):
        read_data(written(tmp_path, "nothing of the kind", "rows.parquet"))


def test_a_form_that_is_asked_for_is_taken_over_what_the_keys_say(tmp_path: Path) -> None:
    both = written(tmp_path, [{**ALPACA[1], "text": "plain"}])
    assert read_data(both).form == "alpaca"
    assert read_data(both, "text").examples[0].text == "plain"
    with pytest.raises(BadValue, match=r"line 1: has no messages \(but input, instruction, output, text\)"):
        read_data(both, "messages")


def test_bad_rows_are_counted_and_named_by_file_and_line(tmp_path: Path) -> None:
    rows = [json.dumps(ALPACA[0]), "{", "[1]", json.dumps({"instruction": "x"}), json.dumps({**ALPACA[0], "output": 3})]
    path = written(tmp_path, "\n".join(rows))
    with pytest.raises(BadValue, match="4 of 5 records of") as fault:
        read_data(path)
    said = str(fault.value)
    assert f"{path}, line 2: not JSON" in said
    assert f"{path}, line 3: holds a list; expected a JSON object" in said
    assert f"{path}, line 4: has no output (but instruction)" in said
    assert "and 1 more; mend them, or leave them out with --skip-bad-rows" in said
    left = read_data(path, skip_bad=True)
    assert [one.where for one in left.examples] == [f"{path}, line 1"]
    assert left.unreadable[-1].why.endswith("output is 3; expected a text")


def test_rows_of_a_json_array_are_named_by_the_line_they_begin_at(tmp_path: Path) -> None:
    path = written(tmp_path, '\n[\n{"text": "a\\nb"},\n\n{"text":\n 7}, {"text": "c"}\n]\n', "rows.json")
    with pytest.raises(BadValue, match="line 5, record 2: text is 7"):
        read_data(path, "text")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "rows.jsonl", "is empty"),
        (" \n", "book.txt", "is empty"),
        ("[]", "rows.json", "has no records"),
        ('{"a": 1, "b": 2}', "rows.jsonl", "the keys are a, b; expected instruction and output"),
        ('{"prompt": "w1", "completion": "w2"}', "rows.jsonl", "rename prompt and completion, or join the messages"),
        ("[1, 2]", "rows.json", "2 of 2 records of .* holds a int"),
        ('[{"text": "a"} {"text": "b"}]', "rows.json", "line 1: found '{' after a record"),
        ('[{"text": "a"}', "rows.json", "line 1: found '' after a record"),
        ('[{"text": "a"},\n{"text": }]', "rows.json", "line 2: not JSON"),
        (
            '{"messages": [{"role": "judge", "content": "x"}]}',
            "rows.jsonl",
            "message 1: role is 'judge'; expected system",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "rows.jsonl", "line 1: no message of the assistant"),
    ],
)
def test_a_file_without_rows_to_train_on_is_refused(tmp_path: Path, content: str, name: str, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        read_data(written(tmp_path, content, name))


def test_files_that_do_not_exist_or_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="does not exist; expected a file, a folder, or a dataset"):
        read_data(str(tmp_path / "absent.jsonl"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadValue, match="not UTF-8 text: byte 3 is 0xe9"):
        read_data(str(tmp_path / "latin.txt"))
    with pytest.raises(BadValue, match="read as plain text, which has no alpaca"):
        read_data(written(tmp_path, "text", "book.txt"), "alpaca")


def test_a_dataset_that_cannot_be_had_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="an optional library")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"the dataset nobody/nothing \(split train\) could not be loaded"):
        read_data("nobody/nothing")


TEXTS = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TEXTS, st.text(), TEXTS), min_size=1, max_size=5), st.sampled_from([None, 1]))
def test_any_alpaca_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], indent: int | None
) -> None:
    """Line separators and quotes in texts included, whether on one line or on many."""
    folder = tmp_path_factory.mktemp("rows")
    values = [{"instruction": one, "input": two, "output": three} for one, two, three in rows]
    array = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode("utf-8", "surrogatepass")
    for name, content in (("rows.json", array), ("rows.jsonl", lines)):
        (folder / name).write_bytes(content)
        found = read_data(str(folder / name), "alpaca").examples
        assert [one.turns[1] for one in found] == [Turn("assistant", three) for _, _, three in rows]


@given(st.binary(max_size=60), st.sampled_from(["rows.json", "rows.jsonl", "rows.txt"]))
def test_any_bytes_are_rows_or_a_failure_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    failed = None
    try:
        found = read_data(str(path)).examples
    except BadValue as fault:
        failed = str(fault)
    assert str(path) in failed if failed is not None else found
