"""A conversation as its chat template writes it, and where in that text the answers stand.

The template is a black box: what it does with a message is found by rendering. A message is known to be in the text if
a number appended to it appears there. An answer begins where the rendering of the messages before it, with the prompt
for an answer, ends; and it ends where the rendering up to and with it ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import TracebackType
from typing import Any, Self

from mwtool.finetune.records import Example, Role, Turn
from mwtool.finetune.template import Call, ChatTemplate, NotRendered, Renderer

_MARK = 7_305_182_946
"""Appended to a message, with its number: digits survive changes of case and the trimming of white space."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an answer's reasoning; templates read one of the first two."""

_SHOWN = re.compile(r"""["']type["']: *["']text["']""")
"""A list of parts that a template prints as a list instead of reading its texts."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A conversation as text.

    spans: where the answers that are trained on stand, as characters; what follows an answer until the template is
    done with it belongs to it. only_last: whether other answers are left out because the template writes them
    differently once messages follow. ended: whether the template writes anything after the last answer.
    """

    text: str
    spans: tuple[Span, ...]
    only_last: bool
    ended: bool


class Conversations:
    """Writes conversations by a template, and counts what it leaves out of them.

    on_prompt: everything is trained on, so that it does not matter where the answers stand.
    unused: how many records have each key that is not in the text. as_system: records whose developer messages are
    written as the system's.
    """

    def __init__(self, template: ChatTemplate, *, on_prompt: bool) -> None:
        self.template, self.on_prompt = template, on_prompt
        self.unused: Counter[str] = Counter()
        self.as_system = 0
        self._plain = Renderer(template, template.text)
        self._with_tools = self._plain if template.tool_text is None else Renderer(template, template.tool_text)
        self._parts: frozenset[Role] = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain.close()
        self._with_tools.close()

    def write(self, example: Example) -> Written | NotRendered:
        """The conversation as text, or why the template does not write it.

        Messages that the template takes only as a list of parts are given to it as one. Raises BadValue if the
        template cannot be used at all.
        """
        first: NotRendered | None = None
        roles = sorted({turn.role for turn in example.turns})
        for parts in dict.fromkeys([self._parts, *_choices(roles)]):
            found = self._written(example, parts)
            if isinstance(found, Written):
                self._parts = parts
                self._count(example)
                return found
            first = first or found
        assert first is not None
        return first

    def _written(self, example: Example, parts: frozenset[Role]) -> Written | NotRendered:
        turns, tools = example.turns, self._tools(example)
        marked, marks = _marked(turns)
        renderer = self._with_tools if tools else self._plain

        def call(some: Sequence[Turn], *, prompt: bool = False) -> Call:
            return Call(messages=[self._message(turn, parts) for turn in some], prompt=prompt, tools=tools)

        calls = [call(turns), call(marked)]
        answers = [] if self.on_prompt else [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        for at in answers:
            calls += [call(turns[:at], prompt=True), call(turns[:at]), call(turns[: at + 1])]
        whole, with_marks, *others = renderer.render(calls, example.where)
        if isinstance(whole, NotRendered):
            return whole
        if parts and _SHOWN.search(whole) and not any(_SHOWN.search(turn.content) for turn in turns):
            return NotRendered("does not take the texts of messages as parts")
        missing = _missing(turns, marks, whole, with_marks)
        if missing is not None:
            return missing
        ended = not isinstance(with_marks, str) or not marks[-1] or bool(with_marks.rpartition(marks[-1])[2].strip())
        if self.on_prompt:
            return Written(text=whole, spans=((0, len(whole)),), only_last=False, ended=ended)
        places = _places(turns, marks, whole, with_marks)
        pieces = [
            [one if isinstance(one, str) else None for one in others[at : at + 3]] for at in range(0, len(others), 3)
        ]
        found = {at: _span(whole, turns, places, at, piece) for at, piece in zip(answers, pieces, strict=True)}
        only_last = any(span is None for span in found.values())
        last = found[answers[-1]]
        if last is None:
            return NotRendered(
                "writes the last answer where its own prompt does not lead; --train-on-prompt needs no prompt"
            )
        spans = [(answers[-1], last)] if only_last else [(at, span) for at, span in found.items() if span is not None]
        trained = tuple(span for at, span in spans if turns[at].trained)
        return Written(text=whole, spans=trained, only_last=only_last, ended=ended)

    def _message(self, turn: Turn, parts: frozenset[Role]) -> dict[str, Any]:
        role = "system" if self._is_system(turn) else turn.role
        content = [{"type": "text", "text": turn.content}] if turn.role in parts else turn.content
        more = {key: value for key, value in turn.more.items() if self._reads(key)}
        said = next((turn.more[key] for key in _REASONING if key in turn.more), None)
        if said is not None:  # as transformers does
            more |= dict.fromkeys(_REASONING[:2], said)
        return {"role": role, "content": content, **more}

    def _is_system(self, turn: Turn) -> bool:
        return turn.role == "developer" and not self.template.reads("developer")

    def _reads(self, key: str) -> bool:
        return any(map(self.template.reads, _REASONING if key in _REASONING else (key,)))

    def _tools(self, example: Example) -> list[dict[str, Any]] | None:
        return list(example.tools) if example.tools and self.template.reads("tools") else None

    def _count(self, example: Example) -> None:
        keys = {key for turn in example.turns for key in turn.more if not self._reads(key)}
        if example.tools and not self.template.reads("tools"):
            keys.add("tools")
        self.unused.update(keys)
        self.as_system += any(map(self._is_system, example.turns))


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or tokens two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _choices(roles: Sequence[Role]) -> Iterator[frozenset[Role]]:
    """Roles whose messages are given as parts: none, all, and every other choice."""
    yield frozenset()
    for size in range(len(roles), 0, -1):
        yield from map(frozenset, combinations(roles, size))


def _marked(turns: Sequence[Turn]) -> tuple[list[Turn], list[str]]:
    """The same messages, each with a number of its own at its end, and the numbers; none for an empty message."""
    said, base = "".join(turn.content for turn in turns), _MARK
    while str(base) in said:
        base += 1
    marks = [f"{base}{number:04}" if turn.content.strip() else "" for number, turn in enumerate(turns)]
    return [
        Turn(turn.role, _with_mark(turn.content, mark), turn.trained, turn.more) if mark else turn
        for turn, mark in zip(turns, marks, strict=True)
    ], marks


def _with_mark(content: str, mark: str) -> str:
    text = content.rstrip()
    return text + mark + content[len(text) :]


def _places(turns: Sequence[Turn], marks: Sequence[str], whole: str, with_marks: str | NotRendered) -> dict[int, Span]:
    """Where the texts of the messages stand, by their number; of none if the marks changed more than themselves."""
    if not isinstance(with_marks, str):
        return {}
    numbers = {mark: at for at, mark in enumerate(marks) if mark}
    found, rest = {}, ""
    for piece in re.split(f"({'|'.join(numbers)})" if numbers else "(?!)", with_marks):
        if piece in numbers:
            begin = len(rest) - len(turns[numbers[piece]].content.strip())
            found[numbers[piece]] = (begin, len(rest))
        else:
            rest += piece
    if rest != whole:
        return {}
    return {at: span for at, span in found.items() if whole[slice(*span)] == turns[at].content.strip()}


def _missing(
    turns: Sequence[Turn], marks: Sequence[str], whole: str, with_marks: str | NotRendered
) -> NotRendered | None:
    """The first message whose text, or whose call of a function, is not in the rendering."""
    for number, (turn, mark) in enumerate(zip(turns, marks, strict=True), start=1):
        there = mark in with_marks if isinstance(with_marks, str) else _bare(turn.content) in _bare(whole)
        if not there:
            return NotRendered(f"leaves the text of message {number} ({turn.role}) out")
        names = [call["function"]["name"] for call in turn.more.get("tool_calls", ())]
        if not turn.content.strip() and any(name not in whole for name in names):
            return NotRendered(f"leaves the tool_calls of message {number} ({turn.role}) out")
    return None


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text)


def _span(
    whole: str,
    turns: Sequence[Turn],
    places: dict[int, Span],
    at: int,
    pieces: Sequence[str | None],
) -> Span | None:
    """Where answer number `at` stands in the whole conversation; None if the template writes it differently there.

    pieces: what is rendered before the answer with the prompt for it, the same without the prompt, and what is rendered
    up to the answer and with it; None each where the template refuses so few messages.
    """
    before, base, after = pieces
    if after is None or not whole.startswith(after):
        return None
    if before is not None and whole.startswith(before) and len(before) < len(after):
        return len(before), len(after)
    shared = 0 if base is None else common(base, whole)
    begin = places[at][0] if at in places else after.rfind(turns[at].content.strip() or "\0")
    start = begin if before is None else common(before, after)
    if begin >= 0:  # the prompt continues with what this answer does not have, such as <think>
        start = min(start, begin)
    if at in places and at - 1 in places:
        behind = start >= places[at - 1][1]
    else:
        behind = not at or turns[at - 1].content.strip() in after[:start]
    if not shared <= start < len(after) or not behind:
        return None  # earlier messages are written differently before an answer
    return start, len(after)
