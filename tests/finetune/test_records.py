"""What a record may look like, as other trainers read it, and what is said of one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mwtool.errors import BadValue
from mwtool.evaluation.corpora import text_for
from mwtool.evaluation.tasks import read_choices, read_cloze, read_prompts
from mwtool.finetune.data import read_data
from mwtool.finetune.records import Example, Form, Turn, Unreadable, read_record

ASK, ANSWER = {"role": "user", "content": "Name?"}, {"role": "assistant", "content": "Brown."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": 1}}}


def said(form: Form, **values: Any) -> list[tuple[str, str]]:
    found = read_record("here", values, form)
    assert isinstance(found, Example), found
    return [(turn.role, turn.content) for turn in found.turns]


def why(form: Form, **values: Any) -> str:
    found = read_record("here", values, form)
    assert isinstance(found, Unreadable), found
    return found.why


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("User", "user"), ("HUMAN", "user"), (" system ", "system"), ("developer", "developer"), ("Tool", "tool"),
        ("observation", "tool"), ("function", "tool"),
    ],
)  # fmt: skip
def test_roles_are_understood_in_any_case(name: str, role: str) -> None:
    assert said("messages", messages=[{"role": name, "content": "x"}, ASK, ANSWER])[0] == (role, "x")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Na"}, {"type": "text", "text": "me?"}],
        [{"type": "input_text", "text": "Name?", "image": None}],
        [{"text": "Name?"}],
        ["Name?"],
        {"type": "text", "text": "Name?"},
    ],
)
def test_content_may_be_a_list_of_parts_that_are_texts(content: Any) -> None:
    assert said("messages", messages=[{"role": "user", "content": content}, ANSWER])[0] == ("user", "Name?")


@pytest.mark.parametrize(
    "values",
    [
        {"messages": None, "conversations": [ASK, ANSWER]},
        {"messages": [], "conversations": [ASK, ANSWER]},
        {"messages": [ASK, ANSWER], "conversations": None},
        {"messages": json.dumps([ASK, ANSWER])},
        {"messages": [{"role": None, "from": "human", "content": None, "value": "Name?"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Name?", "role": None}, {"from": "gpt", "value": "Brown."}]},
    ],
)
def test_null_beside_a_filled_twin_is_nothing(values: dict[str, Any]) -> None:
    assert said("messages", **values) == [("user", "Name?"), ("assistant", "Brown.")]


def test_system_history_and_tools_beside_an_instruction_are_read() -> None:
    values = {"system": "Be brief.", "history": [["Hi", "Hello"]], "instruction": "Name?", "output": "Brown."}
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), *said("alpaca", **values)[3:]]
    assert said("alpaca", **values) == expected
    assert said("alpaca", **{**values, "history": None, "system": ""}) == expected[3:]
    found = read_record("here", {**values, "tools": json.dumps([{"name": "look_up", "x": None}])}, "alpaca")
    assert isinstance(found, Example)
    assert found.tools == ({"name": "look_up"},)


def test_calls_of_tools_have_their_arguments_as_objects_in_every_spelling() -> None:
    text = {"name": "look_up", "arguments": '{"q": 1}'}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": text, "id": None}]},
        {"role": "assistant", "content": None, "function_call": text},
        {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": {"q": 1}})},
    ):
        found = read_record("here", {"messages": [ASK, message]}, "messages")
        assert isinstance(found, Example), found
        assert (found.turns[1].content, found.turns[1].more) == ("", {"tool_calls": [CALL]})


@pytest.mark.parametrize("weight", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_weight_0_is_not_trained_and_messages_behind_the_last_answer_are_cut(weight: dict[str, Any]) -> None:
    found = read_record(
        "here", {"messages": [ASK, {**ANSWER, **weight}, ASK, {**ANSWER, "weight": 1}, ASK, ASK]}, "messages"
    )
    assert isinstance(found, Example)
    assert ([turn.trained for turn in found.turns], found.cut) == ([True, False, True, True], 2)


def test_keys_that_nothing_reads_are_kept_by_name() -> None:
    found = read_record("here", {"messages": [{**ASK, "name": "Ann"}, ANSWER], "id": 3, "source": None}, "messages")
    assert isinstance(found, Example)
    assert (found.unused, found.turns[0].more) == (("id",), {"name": "Ann"})
    assert Turn("user", "x") == Turn("user", "x")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "judge", "content": "x"}, "message 1: role is 'judge'; expected system, developer, user"),
        ({"content": "x"}, "message 1: has no role (but content); expected system"),
        ({"role": "user"}, "message 1: has no content (but role); expected a text"),
        ({"role": "user", "content": 3}, "message 1: content is 3; expected a text"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "has a part of type 'image'; expected parts"),
        ("hello", "message 1 is 'hello'; expected an object with role and content"),
        (
            {"role": "assistant", "content": None, "tool_calls": []},
            "message 1 of the assistant has content null and tool_calls []; expected a text, or calls in tool_calls",
        ),
        ({"from": "gpt", "value": None, "content": None}, "the assistant has content null and value null; expected"),
        ({"role": "assistant", "content": " "}, 'message 1 of the assistant has content " "; expected a text, or'),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "message 1: weight is 0.5; expected 0 or 1"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            "message 1 calls {'id': 1}; expected a func",
        ),
    ],
)
def test_a_message_that_cannot_be_read_is_named_with_what_was_expected(message: Any, expected: str) -> None:
    assert expected in why("messages", messages=[message, ASK, ANSWER])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [{"role": "judge", "content": "x"}]}, "line 1: message 1: role is 'judge'"),
        ({"messages": [ASK]}, "line 1: no message of the assistant"),
        ({"instruction": "x", "output": None, "messages": None}, "line 1: output is None; expected a text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "line 1: round 1 of history is ['a']; expected a qu"),
        ({"text": 7}, "line 1: text is 7; expected a text"),
    ],
)
def test_a_record_is_refused_by_the_complaint_of_its_own_form(tmp_path: Path, values: Any, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(values))
    with pytest.raises(BadValue) as fault:
        read_data(str(tmp_path / "rows.jsonl"))
    assert expected in str(fault.value)


HALF = '"cut \\ud83d"'


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "record",
    [
        f'{{"instruction": {HALF}, "output": "Yes"}}',
        f'{{"instruction": "x", "output": "y", {HALF}: 1}}',
        f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": {HALF}}}]}}]}}',
        '{"instruction": "\\udc00", "output": "y"}',
        '{"instruction": "caf\udce9", "output": "y"}',
    ],
)
def test_half_a_surrogate_pair_or_a_byte_that_is_not_utf8_costs_its_own_record(
    tmp_path: Path, name: str, record: str
) -> None:
    good = '{"instruction": "smile \\ud83d\\ude00", "output": "Yes"}'
    content = f"[{good},\n{record}]" if name == "rows.json" else f"{good}\n{record}"
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        BadValue, match=r"1 of 2 records of .*, line 2.*: (contains half of a surrogate pair|not UTF-8)"
    ):
        read_data(str(tmp_path / name))
    left = read_data(str(tmp_path / name), skip_bad=True)
    assert [turn.content for turn in left.examples[0].turns] == ["smile 😀", "Yes"]
    assert len(left.unreadable) == 1


def test_half_a_surrogate_pair_in_a_task_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for read, record in (
        (read_choices, f'{{"query": {HALF}, "choices": ["a", "b"], "gold": 0}}'),
        (read_choices, f'{{"query": "q", "choices": ["a", {HALF}], "gold": 0}}'),
        (read_cloze, f'{{"context": {HALF}, "continuation": "x"}}'),
        (read_prompts, f'{{"prompt": {HALF}}}'),
        (lambda path: text_for(str(path)), f'{{"text": {HALF}}}'),
    ):
        path.write_text("\n" + record)
        with pytest.raises(BadValue, match=r"rows\.jsonl, line 2: contains half of a surrogate pair \(\\ud83d\)"):
            read(path)
    (tmp_path / "prompts.txt").write_bytes(b"one\ncaf\xe9")
    with pytest.raises(BadValue, match=r"prompts\.txt, line 2: not UTF-8 text \(byte 0xe9\)"):
        read_prompts(tmp_path / "prompts.txt")
