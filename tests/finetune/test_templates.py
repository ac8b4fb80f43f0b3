"""Chat templates: which tokens are trained on under any of them, and what a hostile one can do."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mwtool.errors import BadValue
from mwtool.finetune.conversation import Conversations, Written, common
from mwtool.finetune.data import Data
from mwtool.finetune.records import Example, Turn
from mwtool.finetune.sequences import IGNORED, Encoded
from mwtool.finetune.template import Call, ChatTemplate, Renderer, find_template
from mwtool.finetune.tokenize import encode
from mwtool.models.source import DEMO

ASK = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}"
TALK = (Turn("user", "Is the sun hot?"), Turn("assistant", "Yes"), Turn("user", "And ice?"), Turn("assistant", "Cold"))
PARTS = "| selectattr('type', 'equalto', 'text') | map(attribute='text') | join"


def ending(
    prompt: str, answer: str = "{{ m.content }}", end: str = "{{ eos_token }}", writes: str | None = None
) -> str:
    """A template whose prompt for an answer is `prompt`; `writes`: what it puts before an answer instead."""
    begins = prompt if writes is None else writes
    return (
        ASK + begins + answer + end + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


def tokenizer_with(template: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = template
    return tokenizer


def encoded(
    template: Any, turns: tuple[Turn, ...] = TALK[:2], *, tools: tuple[Any, ...] = (), **options: Any
) -> Encoded:
    example = Example(where="rows.jsonl, line 1", turns=turns, tools=tools)
    return encode(
        Data(name="rows.jsonl", form="messages", examples=(example,)), tokenizer_with(template), 500, **options
    )


def learned(found: Encoded) -> str:
    labels = found.labels[0]
    return str(tokenizer_with(None).decode(labels[labels != IGNORED]))


@pytest.mark.parametrize(
    ("prompt", "writes", "expected"),
    [
        ("A: ", None, "Yes</s>"),
        ("A:\n", None, "Yes</s>"),
        ("A: <think>", "A: ", "Yes</s>"),
        ("A: <think>\n\n</think>\n", "A: ", "Yes</s>"),
        ("A: ", "A: <think></think>", "<think></think>Yes</s>"),
    ],
)
def test_the_whole_answer_and_its_end_are_learned_however_the_prompt_for_it_ends(
    prompt: str, writes: str | None, expected: str
) -> None:
    assert learned(encoded(ending(prompt, writes=writes))).strip() == expected


def test_training_on_the_prompt_needs_no_boundary() -> None:
    found = encoded(ending("Nothing like it", writes="A: "), on_prompt=True)
    assert torch.equal(found.ids[0][1:], found.labels[0][1:])


@pytest.mark.parametrize("roles", [("user", "assistant"), ("user",), ("assistant",)])
def test_messages_are_given_as_parts_to_a_template_that_reads_parts_alone(roles: tuple[str, ...]) -> None:
    ask, answer = (f"{{{{ m.content {PARTS if role in roles else ''} }}}}" for role in ("user", "assistant"))
    template = ending("A:\n", answer=answer).replace("{{ m.content }}\n{% else", ask + "\n{% else")
    found = encoded(template, TALK)
    assert learned(found).replace("\n", "") == "Yes</s>Cold</s>"
    assert "Is the sun hot?" in tokenizer_with(None).decode(found.ids[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ending("A:\n", answer=""), r"leaves the text of message 2 \(assistant\) out"),
        (ending("A:\n").replace("Q: {{ m.content }}", "Q:"), r"leaves the text of message 1 \(user\) out"),
        (ending("A:\n", answer="{{ messages[0].content }}"), "leaves the text of message 2"),
        ("{{ messages[0].content + 1 }}", r"fails on it \(TypeError: can only concatenate"),
        ("{{ messages[99].content }}", "fails on it"),
        ("{{ 1 // 0 }}", r"fails on it \(ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails on it \(RecursionError"),
        ("{{ raise_exception('no\nway') }}", r"refuses it \(no way\)"),
    ],
)
def test_a_record_that_the_template_does_not_write_is_refused_with_the_reason(template: str, message: str) -> None:
    with pytest.raises(BadValue, match=message) as fault:
        encoded(template, (Turn("user", "Yes or no?"), Turn("assistant", "Yes")))
    assert "\n" not in str(fault.value)
    assert "choose another with --chat-template" in str(fault.value)


def test_a_template_that_cannot_be_compiled_or_chosen_is_one_line_that_says_how_to_choose() -> None:
    with pytest.raises(BadValue, match=r"'default' cannot be used \(TemplateSyntaxError: line 1: .*--chat-template"):
        encoded("{% if %}")
    with pytest.raises(
        BadValue, match="chat templates rag, tool_use and none called default; choose one with --chat-te"
    ):
        encoded({"rag": "x", "tool_use": "y"})
    with pytest.raises(BadValue, match="'absent' is neither a chat template's name nor a file; the tokenizer has b"):
        encoded({"b": "x"}, chat_template="absent")
    with pytest.raises(BadValue, match="neither a chat template's name nor a file"):
        encoded("x", chat_template="a\0b")


def test_a_template_is_chosen_by_name_or_file_and_tool_use_is_taken_for_tools(tmp_path: Any) -> None:
    named = {"default": ending("A:\n"), "loud": ending("A!\n"), "tool_use": "{{ tools[0].name }}" + ending("T:\n")}
    (tmp_path / "own.jinja").write_text(ending("Own:\n"))
    text = tokenizer_with(None)
    for options, mark in (
        ({}, "A:\n"),
        ({"chat_template": "loud"}, "A!\n"),
        ({"chat_template": str(tmp_path / "own.jinja")}, "Own:\n"),
        ({"tools": ({"name": "look_up"},)}, "look_up"),
    ):
        assert mark in text.decode(encoded(named, **options).ids[0])


@pytest.mark.parametrize(("end", "noted"), [("", True), ("\n", True), ("</s>", False), ("<|end|>\n", False)])
def test_a_template_that_ends_no_answer_is_noted(end: str, *, noted: bool) -> None:
    notes = encoded(ending("A:\n", end=end)).notes
    assert any("the chat template writes no end" in note for note in notes) == noted


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ [0] * 10**10 }}",
        "{{ 10**(10**9) }}",
        "{{ range(10**9) | list }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{% set n = namespace(x='x' * 10**6) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x | replace('', n.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x] * 9) %}{% endfor %}",
        "{{ range(99999) | join('x' * 999999) }}",
        "{{ range(99999) | map('string') | join('x' * 999999) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ 'x' | center(width=10**10) }}",
        "{{ 'x' | indent(10**10, first=true) }}",
        "{{ ('x\n' * 99999) | indent('y' * 99999) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ '{0:9999999999}'.format(1) }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x'.zfill(10**10) }}",
        "{{ ('\t' * 9).expandtabs(10**10) }}",
        "{{ ('x' * 9999).replace('x', 'x' * 9999) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'base.html' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_multiplies_recurses_or_reads_files_fails_before_it_has_the_memory(template: str) -> None:
    with pytest.raises(BadValue, match="fails on it") as fault:
        encoded(template)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("template", "limits", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            {"seconds": 0.5},
            "takes longer",
        ),
        (
            "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + ['x' * 9999999] %}{% endfor %}",
            {"memory": 1 << 28},
            "needs more than 0.25 GiB of memory",
        ),
    ],
)
def test_a_template_without_end_is_ended_with_one_line(template: str, limits: dict[str, Any], message: str) -> None:
    found = ChatTemplate(text=template, name="hostile")
    with Renderer(found, template, **limits) as renderer, pytest.raises(BadValue, match=message) as fault:
        renderer.render([Call(messages=[])], "rows.jsonl, line 3")
    assert "\n" not in str(fault.value)


def test_the_date_of_the_run_is_what_a_template_writes() -> None:
    template = "{{ strftime_now('%d %B %Y') }}" + ending("A:\n")
    found = encoded(template, date=datetime(2024, 2, 29))  # noqa: DTZ001 # a day, wherever
    assert "29 February 2024" in tokenizer_with(None).decode(found.ids[0])
    assert found.date == datetime(2024, 2, 29)  # noqa: DTZ001 # likewise
    assert encoded(ending("A:\n")).date is None


@pytest.mark.parametrize("template", [ending("A: "), "{% generation %}{{ messages | tojson }}{% endgeneration %}"])
@pytest.mark.parametrize("prompt", [False, True])
def test_what_is_rendered_is_what_transformers_renders(template: str, *, prompt: bool) -> None:
    tokenizer = tokenizer_with(template)
    messages = [{"role": turn.role, "content": turn.content + " é'\"<"} for turn in TALK]
    found = find_template(tokenizer)
    assert found is not None
    with Renderer(found, found.text) as renderer:
        ours = renderer.render([Call(messages=messages, prompt=prompt)], "here")
    assert ours == [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)]


def test_weight_0_keeps_an_answer_from_being_learned() -> None:
    silent = Turn("assistant", "Yes", trained=False)
    assert learned(encoded(ending("A:\n"), (TALK[0], silent, *TALK[2:]))).strip() == "Cold</s>"
    with pytest.raises(BadValue, match="1 are without an answer to train on: all have weight 0"):
        encoded(ending("A:\n"), (TALK[0], silent))


def test_what_a_template_does_not_read_is_counted_and_what_it_reads_is_given_to_it() -> None:
    reading = ending("A:\n", answer="{{ m.reasoning_content }}{{ m.content }}")
    turns = (TALK[0], Turn("assistant", "Yes", more={"reasoning_content": "It shines.", "name": "x"}))
    found = encoded(reading, turns)
    assert "It shines." in tokenizer_with(None).decode(found.ids[0])
    assert found.notes == ("not used, since the chat template does not write it: name (in 1)",)
    assert "name (in 1), reasoning_content (in 1)" in encoded(ending("A:\n"), turns).notes[0]


def test_calls_of_tools_are_written_or_the_record_is_refused() -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "ice"}}}
    turns = (TALK[0], Turn("assistant", "", more={"tool_calls": [call]}), Turn("tool", "cold"), TALK[3])
    answer = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    assert learned(encoded(ending("A:\n", answer=answer), turns)).replace("\n", "").startswith('{"name": "look_up"')
    with pytest.raises(BadValue, match=r"leaves the tool_calls of message 2 \(assistant\) out"):
        encoded(ending("A:\n"), turns)


WORDS = st.text(alphabet="ab é\n'\"😀<>{}", min_size=1, max_size=12).filter(lambda text: text.strip() != "")
SEPARATORS = st.sampled_from(["", " ", "\n", ": ", "</s>", "\n\n", "[x]"])


@cache
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@settings(max_examples=25)
@given(
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    heads=st.tuples(SEPARATORS, SEPARATORS, SEPARATORS, SEPARATORS),
    opened=st.sampled_from(["", "<think>", "<think>\n"]),
    rewritten=st.booleans(),
    parts=st.booleans(),
    end=st.sampled_from(["", "</s>", "</s>\n"]),
)
def test_every_sequence_is_the_tokens_of_its_parts_and_the_answers_are_learned(
    turns: list[tuple[str, str]],
    heads: tuple[str, str, str, str],
    opened: str,
    rewritten: bool,  # noqa: FBT001 # as hypothesis gives it
    parts: bool,  # noqa: FBT001 # likewise
    end: str,
) -> None:
    """The parts are put together here, beside the template, which writes the last answer differently if `rewritten`."""
    ask, asked, head, tail = heads
    content = f"{{{{ m.content {PARTS if parts else ''} }}}}"
    thought = "<t></t>" if rewritten else ""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + repr_of(f"U{ask}") + content + repr_of(asked)
        + "{% else %}" + repr_of(f"A{head}") + "{% if loop.last %}" + repr_of(thought) + "{% endif %}" + content
        + repr_of(tail + end) + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + repr_of(f"A{head}{opened}") + "{% endif %}"
    )  # fmt: skip
    pieces: list[tuple[str, bool]] = []
    for number, (question, answer) in enumerate(turns):
        last = number == len(turns) - 1
        begun = opened[: common(opened, thought)] if last else ""  # what the prompt for the answer wrote already
        pieces.append((f"U{ask}{question}{asked}A{head}{begun}", False))
        pieces.append(((thought if last else "")[len(begun) :] + answer + tail + end, last or not rewritten))
    example = Example(
        where="here", turns=tuple(Turn(*one) for pair in turns for one in zip(("user", "assistant"), pair, strict=True))
    )  # type: ignore[arg-type] # the roles
    whole = "".join(piece for piece, _ in pieces)
    tokenizer = bundled()
    with Conversations(ChatTemplate(text=template, name="random"), on_prompt=False) as conversations:
        written = conversations.write(example)
    assert isinstance(written, Written), written
    assert written.text == whole
    tokenizer.chat_template = template
    found = encode(Data(name="d", form="messages", examples=(example,)), tokenizer, 4000)
    plain = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    assert found.ids[0].tolist() == plain["input_ids"]
    place, spans = 0, []
    for piece, trained in pieces:
        spans += [(place, place + len(piece))] if trained else []
        place += len(piece)
    expected = [
        any(start < max(after, at + 1) and at < stop for start, stop in spans) for at, after in plain["offset_mapping"]
    ]
    assert [label != IGNORED for label in found.labels[0].tolist()] == [False, *expected[1:]]


def repr_of(text: str) -> str:
    """A text as a Jinja expression, which trims nothing."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"{{{{ '{escaped}' }}}}"
