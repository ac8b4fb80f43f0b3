"""One record of training data as a conversation or a text, in any of the three forms, or why it cannot be read.

The keys that other trainers read are read here, too: `system`, `history` and `tools` beside an instruction or beside
messages, `weight` and `train` on a message, `tool_calls`. Keys that stay unused are kept by name, to be counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mwtool.errors import BadValue
from mwtool.files.text import keys_of, shown

Form = Literal["alpaca", "messages", "text"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
FORMS: tuple[Form, ...] = get_args(Form)
KEYS: dict[Form, tuple[str, ...]] = {
    "alpaca": ("instruction", "output", "input"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
}
"""The keys that say which form a record has."""
EXPECTED = "instruction and output (alpaca), messages or conversations (messages), or text (text)"
_BESIDE = ("system", "history", "tools")
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "function_call"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    trained: whether an assistant's answer is trained on; not with `weight: 0`. more: what else the message carries,
    by key, for templates that read it.
    """

    role: Role
    content: str
    trained: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record: a conversation, or a text.

    where: `FILE, line N`, in a JSON array with `, record M`. tools: JSON schemas of the functions that the assistant
    may call. cut: messages behind the last answer, which are left out. unused: keys that nothing reads.
    """

    where: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    cut: int = 0
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that is left out. why: where it is, what was found and what was expected."""

    why: str


def form_of(values: Mapping[str, Any]) -> Form | None:
    """The form whose keys a record has, filled; None if it has none of them."""
    return next((form for form in FORMS if any(_filled(values.get(key)) for key in KEYS[form])), None)


def read_record(where: str, values: Mapping[str, Any], form: Form) -> Example | Unreadable:
    """A record of the given form."""
    try:
        return _READERS[form](where, values)
    except BadValue as fault:
        return Unreadable(f"{where}: {fault}")


def _text(where: str, values: Mapping[str, Any]) -> Example:
    return Example(where=where, text=_string(values, "text"), unused=_unused(values, ("text",)))


def _alpaca(where: str, values: Mapping[str, Any]) -> Example:
    asked = [_string(values, "instruction", optional=_filled(values.get("input")))]
    asked += [_string(values, "input", optional=True)]
    answer = Turn("assistant", _string(values, "output"))
    turns = [*_system(values), *_history(values), Turn("user", "\n\n".join(one for one in asked if one)), answer]
    unused = _unused(values, (*KEYS["alpaca"], *_BESIDE))
    return Example(where=where, turns=tuple(turns), tools=_tools(values), unused=unused)


def _messages(where: str, values: Mapping[str, Any]) -> Example:
    key = next((key for key in KEYS["messages"] if _filled(values.get(key))), None)
    if key is None:
        key = next((key for key in KEYS["messages"] if key in values), "messages")
        raise _wrong(values, key, "a list of messages")
    given = _decoded(values[key])
    if not isinstance(given, list):
        raise _wrong(values, key, "a list of messages")
    turns = [_turn(number, one) for number, one in enumerate(given, start=1)]
    used = [key, "tools"]
    if not any(turn.role in ("system", "developer") for turn in turns):
        turns = [*_system(values), *turns]
        used.append("system")
    answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise BadValue("no message of the assistant; there is nothing to train on")
    kept = tuple(turns[: answers[-1] + 1])
    unused = _unused(values, used)
    return Example(where=where, turns=kept, tools=_tools(values), cut=len(turns) - len(kept), unused=unused)


_READERS: dict[Form, Callable[[str, Mapping[str, Any]], Example]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "text": _text,
}


def _turn(number: int, one: Any) -> Turn:
    if not isinstance(one, dict):
        raise BadValue(f"message {number} is {shown(one)}; expected an object with role and content")
    role_key, text_key = _first(one, _ROLE_KEYS), _first(one, _TEXT_KEYS)
    name = one.get(role_key)
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        found = f"role is {shown(name)}" if role_key in one else f"has no role (but {keys_of(one)})"
        raise BadValue(f"message {number}: {found}; expected system, developer, user, assistant or tool")
    calls = _calls(number, one, text_key) if role == "assistant" else []
    spoken = isinstance(name, str) and name.strip().lower() == "function_call"
    said = one.get(text_key)
    if role == "assistant" and said is None and not calls and (text_key in one or "tool_calls" in one):
        raise _silent(number, one)
    content = "" if spoken and calls else _content(number, said, text_key, one, optional=bool(calls))
    if role == "assistant" and not content.strip() and not calls:
        raise _silent(number, one)
    taken = {role_key, text_key, "tool_calls", "function_call"}
    trained = True
    if role == "assistant":
        trained = _weight(number, one)
        taken |= {"weight", "train"}
    more = {str(key): _compact(value) for key, value in one.items() if key not in taken and _filled(value)}
    if calls:
        more["tool_calls"] = calls
    return Turn(role, content, trained, more)


def _silent(number: int, message: Mapping[str, Any]) -> BadValue:
    """An answer without a text, whose calls are absent or empty: there is nothing in it to train on."""
    keys = [key for key in (*_TEXT_KEYS, "tool_calls", "function_call") if key in message]
    found = " and ".join(f"{key} {json.dumps(message[key], default=str)[:40]}" for key in keys)
    return BadValue(f"message {number} of the assistant has {found}; expected a text, or calls in tool_calls")


def _content(number: int, value: Any, key: str, message: Mapping[str, Any], *, optional: bool) -> str:
    """A text, or a list of parts that are texts, as one."""
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        found = f"{key} is {shown(value)}" if key in message else f"has no content (but {keys_of(dict(message))})"
        raise BadValue(f"message {number}: {found}; expected a text")
    return "".join(_part(number, one) for one in value)


def _part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        found = f"a part of type {shown(kind)}" if kind not in _TEXT_PARTS else f"the part {shown(part)}"
        raise BadValue(f"message {number} has {found}; expected parts of type text")
    return text


def _weight(number: int, message: Mapping[str, Any]) -> bool:
    """OpenAI's `weight`, 0 or 1, and axolotl's `train`, true or false."""
    for key in ("weight", "train"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise BadValue(f"message {number}: {key} is {shown(value)}; expected 0 or 1")
    return all(message.get(key) != 0 for key in ("weight", "train"))


def _calls(number: int, message: Mapping[str, Any], text_key: str) -> list[dict[str, Any]]:
    """The functions an assistant calls, with their arguments as objects, which chat templates read."""
    calls = _decoded(message.get("tool_calls"))
    if not _filled(calls) and _filled(message.get("function_call")):
        calls = [{"type": "function", "function": message["function_call"]}]
    role = message.get(_first(message, _ROLE_KEYS))
    if not _filled(calls) and isinstance(role, str) and role.strip().lower() == "function_call":
        given = _decoded(message.get(text_key))
        calls = [{"type": "function", "function": one} for one in (given if isinstance(given, list) else [given])]
    if not _filled(calls):
        return []
    if not isinstance(calls, list):
        raise BadValue(f"message {number}: tool_calls is {shown(calls)}; expected a list of calls")
    return [_call(number, one) for one in calls]


def _call(number: int, call: Any) -> dict[str, Any]:
    call = _compact(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadValue(f"message {number} calls {shown(call)}; expected a function with name and arguments")
    function = {**function, "arguments": _decoded(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _system(values: Mapping[str, Any]) -> list[Turn]:
    value = values.get("system")
    if not _filled(value):
        return []
    return [Turn("system", _string(values, "system"))]


def _history(values: Mapping[str, Any]) -> list[Turn]:
    """Earlier rounds beside an instruction, as LLaMA-Factory has them: a list of question and answer."""
    value = values.get("history")
    if not _filled(value):
        return []
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return [_turn(number, one) for number, one in enumerate(value, start=1)]
    turns: list[Turn] = []
    for number, one in enumerate(value if isinstance(value, list) else [value], start=1):
        pair = isinstance(one, list | tuple) and len(one) == 2  # noqa: PLR2004 # a question and its answer
        if not pair or not all(isinstance(text, str) and text.strip() for text in one):
            raise BadValue(f"round {number} of history is {shown(one)}; expected a question and an answer")
        turns += [Turn("user", one[0]), Turn("assistant", one[1])]
    return turns


def _tools(values: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    value = _decoded(values.get("tools"))
    if not _filled(value):
        return ()
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadValue(f"tools is {shown(value)}; expected a list of JSON schemas")
    return tuple(_compact(one) for one in value)


def _decoded(value: Any) -> Any:
    """A value that some data sets hold as JSON inside a string; any other string stays one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _compact(value: Any) -> Any:
    """A value without the keys that are null only because Parquet gives every record all keys."""
    if isinstance(value, dict):
        return {str(key): _compact(one) for key, one in value.items() if one is not None}
    return [_compact(one) for one in value] if isinstance(value, list) else value


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of the keys that is filled, else the first that is there, else the first."""
    filled = (key for key in keys if values.get(key) is not None)
    return next(filled, next((key for key in keys if key in values), keys[0]))


def _filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _unused(values: Mapping[str, Any], used: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(str(key) for key, value in values.items() if key not in used and _filled(value))


def _string(values: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = values.get(key)
    if optional and (value is None or value == ""):
        return ""
    if not isinstance(value, str) or not (optional or value.strip()):
        raise _wrong(values, key, "a text, or nothing" if optional else "a text")
    return value


def _wrong(values: Mapping[str, Any], key: str, expected: str) -> BadValue:
    if key not in values:
        return BadValue(f"has no {key} (but {keys_of(dict(values))})")
    return BadValue(f"{key} is {shown(values[key])}; expected {expected}")
