"""Chat templates: which one is used, and rendering it within a limit of time and memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mwtool.errors import BadValue
from mwtool.files.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESS = Path(__file__).with_name("template_process.py")
_POLL = 0.05
"""Seconds from one look at the process to the next."""
ADVICE = "choose another with --chat-template NAME or FILE"


def today() -> datetime:
    """The date that templates are given, at midnight: all processes of a run must read the same."""
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)  # noqa: DTZ005 # as transformers' strftime_now


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A Jinja template as transformers' `apply_chat_template` takes it.

    text: its source. tool_text: the one for conversations with tools, where the tokenizer has one (`tool_use`).
    name: what was asked for, for messages. variables: the special tokens it may write, by name. now: what
    `strftime_now` formats.
    """

    text: str
    name: str
    tool_text: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=today)

    @cached_property
    def writes_date(self) -> bool:
        """Whether what it writes depends on the day."""
        return "strftime_now" in self.text + (self.tool_text or "")

    def reads(self, key: str) -> bool:
        """Whether the word `key` stands anywhere in its source."""
        return re.search(rf"\b{re.escape(key)}\b", self.text + (self.tool_text or "")) is not None


def find_template(
    tokenizer: PreTrainedTokenizerBase, asked: str | None = None, now: datetime | None = None
) -> ChatTemplate | None:
    """The template that `--chat-template` names, else the tokenizer's; None where the tokenizer has none.

    asked: the name of one of the tokenizer's templates, or a file. Raises BadValue if there is no such template, or
    the tokenizer has several and none of them is the default.
    """
    found = tokenizer.chat_template
    named: dict[str, str] = found if isinstance(found, dict) else {}
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    options: dict[str, Any] = {"variables": variables, "now": now or today()}
    if asked is not None:
        return ChatTemplate(text=_asked(asked, found, named), name=asked, **options)
    if not found:
        return None
    if isinstance(found, str):
        return ChatTemplate(text=found, name="default", **options)
    if "default" not in named:
        raise BadValue(
            f"the tokenizer has the chat templates {', '.join(sorted(named))} and none called default; choose one with "
            f"--chat-template NAME, or give a FILE"
        )
    return ChatTemplate(text=named["default"], name="default", tool_text=named.get("tool_use"), **options)


def _asked(asked: str, found: object, named: dict[str, str]) -> str:
    if asked in named:
        return named[asked]
    if asked == "default" and isinstance(found, str):
        return found
    path = Path(asked).expanduser() if "\0" not in asked else None
    if path is None or not path.is_file():
        known = f"the tokenizer has {', '.join(sorted(named))}" if named else "the tokenizer has no named ones"
        raise BadValue(f"--chat-template {asked!r} is neither a chat template's name nor a file; {known}")
    return read_text(path, "a Jinja template")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One rendering: messages as the template reads them. prompt: with the beginning of an answer behind them."""

    messages: list[dict[str, Any]]
    prompt: bool = False
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class NotRendered:
    """Why a call gave no text, as a clause that follows `the chat template`."""

    why: str


class Renderer:
    """Renders one source text in a process of its own, which is ended when the block is.

    seconds: the longest that one request may take. memory: bytes the process may hold.
    """

    def __init__(self, template: ChatTemplate, text: str, *, seconds: float = 20.0, memory: int = 1 << 30) -> None:
        self.template, self.text, self.seconds, self.memory = template, text, seconds, memory
        self._process: subprocess.Popen[str] | None = None
        self._answers: SimpleQueue[str | None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):  # its end of the pipe may be closed, with something left to flush
                self._process.communicate()
            self._process = None

    def render(self, calls: Sequence[Call], where: str) -> list[str | NotRendered]:
        """What the template writes for each call. where: whose they are, for the message.

        Raises BadValue if the template cannot be compiled, takes too long or needs too much memory.
        """
        if self._process is None:
            self._start(where)
        request = [{"messages": one.messages, "prompt": one.prompt, "tools": one.tools} for one in calls]
        return [_result(one) for one in self._ask(request, where, self.seconds)]

    def _start(self, where: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 # our own file, by the interpreter that runs this
            [sys.executable, "-P", "-W", "ignore", str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()
        now, variables = self.template.now.isoformat(), self.template.variables
        first = {"template": self.text, "now": now, "globals": variables, "memory": self.memory}
        found = self._ask(first, where, 3 * self.seconds)  # it starts, and compiles
        if "error" in found:
            self.close()
            raise BadValue(f"the chat template {self.template.name!r} cannot be used ({found['error']}); {ADVICE}")

    def _ask(self, request: Any, where: str, seconds: float) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: seen below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        end = time.monotonic() + seconds
        while True:
            try:
                answer = self._answers.get(timeout=_POLL)
            except Empty:
                if time.monotonic() > end:
                    raise self._stopped(f"takes longer than {seconds:g} s", where) from None
                if _memory(self._process.pid) > self.memory:
                    raise self._exhausted(where) from None
                continue
            if answer is None:
                raise self._stopped("ends the process that renders it", where)
            found = json.loads(answer)
            if found == {"exhausted": True}:
                raise self._exhausted(where)
            return found

    def _exhausted(self, where: str) -> BadValue:
        return self._stopped(f"needs more than {self.memory / 2**30:.2g} GiB of memory", where)

    def _stopped(self, why: str, where: str) -> BadValue:
        self.close()
        return BadValue(f"the chat template {self.template.name!r} {why} ({where}); {ADVICE}")


def _read(process: subprocess.Popen[str], answers: SimpleQueue[str | None]) -> None:
    """Hand on what the process writes, and None at its end; waiting for a pipe has no time limit on Windows."""
    assert process.stdout is not None
    with suppress(ValueError):  # the pipe was closed
        for answer in process.stdout:
            answers.put(answer)
    answers.put(None)


def _memory(pid: int) -> int:
    import psutil  # type: ignore[import-untyped] # its stubs are a package of their own

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _result(found: dict[str, str]) -> str | NotRendered:
    if "refused" in found:
        return NotRendered(f"refuses it ({found['refused']})")
    if "failed" in found:
        return NotRendered(f"fails on it ({found['failed']})")
    try:
        found["text"].encode()
    except UnicodeEncodeError:
        return NotRendered("writes half a surrogate pair")
    return found["text"]
