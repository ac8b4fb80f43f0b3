"""The process that renders chat templates: run as a script, it answers requests on stdin until stdin is closed.

A chat template is code from whoever published the model. It may loop for hours or build a string of gigabytes, and
Python cannot interrupt either from within. In a process of its own it can be ended, on every platform. This file
imports the standard library and Jinja alone, so that the process starts in a tenth of a second.

One JSON document a line in both directions. The first request is `{"template": str, "now": str, "globals": {...}}`,
answered by `{}` or `{"error": str}`. Each later one is a list of calls `{"messages": [...], "prompt": bool, "tools":
[...] or null}`, answered by a list with `{"text": str}`, `{"refused": str}` where the template raised its own
exception, or `{"failed": str}` for each.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from jinja2.runtime import Context

LARGEST = 10_000_000
"""Characters, items or bits of the largest value an operator may build, and characters of the longest rendering."""
_WIDTH = re.compile(r"\d{8,}")
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,  # RecursionError among them
    StopIteration,
    TypeError,
    ValueError,
)
"""What Python raises inside a template, besides Jinja's own exceptions."""


class Refused(jinja2.TemplateError):
    """Raised by the template itself, with `raise_exception`."""


class Generation(Extension):
    """`{% generation %}` of transformers, which marks what the assistant says: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as transformers configures it, whose operators build nothing larger than `LARGEST`."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, now: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = now.strftime

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result; raises ValueError, before it is computed, if it would be too large."""
        if _size(operator, left, right) > LARGEST:
            raise ValueError(f"the result of {operator} is larger than {LARGEST:,} characters")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """How large the result would be at most: characters, items, or bits of an integer."""
    whole = isinstance(left, int), isinstance(right, int)
    if operator == "*" and any(whole):
        if all(whole):
            return int(left.bit_length() + right.bit_length())
        times, value = (left, right) if whole[0] else (right, left)
        return max(0, times) * len(value) if hasattr(value, "__len__") else 0
    if operator == "**" and all(whole):
        return int(left.bit_length() * max(0, right))
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        return len(left) + len(right)
    if operator == "%" and isinstance(left, str) and (_WIDTH.search(left) or "*" in left):
        return LARGEST + 1  # a width of eight digits, or one that is given as an argument
    return 0


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: FBT001, FBT002 # transformers' signature
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise Refused(message)


def render(template: jinja2.Template, call: dict[str, Any], variables: dict[str, Any]) -> dict[str, str]:
    """What the template writes for one call, or why it writes nothing."""
    pieces, length = [], 0
    try:
        for piece in template.generate(
            messages=call["messages"],
            tools=call["tools"],
            documents=None,
            add_generation_prompt=call["prompt"],
            **variables,
        ):
            pieces.append(piece)
            length += len(piece)
            if length > LARGEST:
                return {"failed": f"it writes more than {LARGEST:,} characters"}
    except Refused as fault:
        return {"refused": line(fault)}
    except (jinja2.TemplateError, *_FAILURES) as fault:
        return {"failed": f"{type(fault).__name__}: {line(fault)}"}
    return {"text": "".join(pieces)}


def line(fault: BaseException) -> str:
    """An exception's message on one line of moderate length."""
    text = " ".join(str(fault).split())
    return text if len(text) <= 200 else f"{text[:197]}..."  # noqa: PLR2004 # a line has room for no more


def serve() -> None:
    """Answer requests until there are no more."""
    first = json.loads(sys.stdin.readline())
    try:
        template = Sandbox(datetime.fromisoformat(first["now"])).from_string(first["template"])
    except (jinja2.TemplateError, *_FAILURES) as fault:
        where = f"line {fault.lineno}: " if isinstance(fault, jinja2.TemplateSyntaxError) else ""
        _answer({"error": f"{type(fault).__name__}: {where}{line(fault)}"})
        return
    _answer({})
    for request in sys.stdin:
        _answer([render(template, call, first["globals"]) for call in json.loads(request)])


def _answer(document: Any) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
