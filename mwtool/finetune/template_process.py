"""The process that renders chat templates: run as a script, it answers requests on stdin until stdin is closed.

A chat template is code from whoever published the model. It may loop for hours or build a string of gigabytes, and
Python cannot interrupt either from within. In a process of its own it can be ended, on every platform. This file
imports the standard library and Jinja alone, so that the process starts in a tenth of a second.

One JSON document a line in both directions. The first request is `{"template": str, "now": str, "globals": {...},
"memory": bytes}`, answered by `{}` or `{"error": str}`. Each later one is a list of calls `{"messages": [...],
"prompt": bool, "tools": [...] or null}`, answered by a list with `{"text": str}`, `{"refused": str}` where the template
raised its own exception, or `{"failed": str}` for each; or by `{"exhausted": true}` where the memory does not suffice.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2.compiler import Frame
    from jinja2.parser import Parser
    from jinja2.runtime import Context

LARGEST = 10_000_000
"""Characters, items or bits of the largest value an operator may build, and characters of the longest rendering."""
_WIDTH = re.compile(r"\d{8,}")
_NESTED = re.compile(r"\{[^{}]*\{|\*")
"""A width that is given as an argument."""
_OVERHEAD = 1 << 28
"""Bytes of address space that Python and Jinja map besides what they hold."""
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
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


class Concatenating(CodeGenerator):
    """Compiles `a ~ b` as a call of `Sandbox.concatenate`; Jinja intercepts all binary operators but this one."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 # as Jinja calls it
        """Write the code of one expression."""
        self.write("environment.concatenate((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as transformers configures it.

    Its operators, its filters and the methods of strings build nothing larger than `LARGEST`.
    """

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    code_generator_class = Concatenating

    def __init__(self, now: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        for name in ("center", "format", "indent", "join", "replace", "wordwrap"):
            self.filters[name] = _bounded(name, self.filters[name])
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = now.strftime

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result; raises ValueError, before it is computed, if it would be too large."""
        if _size(operator, left, right) > LARGEST:
            raise ValueError(f"the result of {operator} is larger than {LARGEST:,} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **named: Any) -> Any:
        """The function's result; raises ValueError, before it is called, if it is a method that builds too much."""
        value = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # Jinja wraps str.format
        if isinstance(value, str | bytes | int):
            args = tuple(map(_read, args))
            _refuse_large(function.__name__, value, args, named)
        return super().call(context, function, *args, **named)

    def concatenate(self, items: tuple[Any, ...]) -> str:
        """The items as one text; raises ValueError if it would be too large."""
        texts = [str(one) for one in items]
        _refuse_large("~", "", [texts], {})
        return "".join(texts)


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


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that raises ValueError, before it is computed, if its result would be too large.

    Jinja tells by an attribute of the function whether the context or the environment comes first.
    """
    passed = getattr(function, "jinja_pass_arg", None)

    def checked(*args: Any, **named: Any) -> Any:
        value, *others = args[passed is not None :]
        if name == "join" and not isinstance(value, str):
            value = _read(value)
            args = (*args[: passed is not None], value, *others)
        _refuse_large(name, value, others, named)
        return function(*args, **named)

    if passed is not None:
        checked.jinja_pass_arg = passed  # type: ignore[attr-defined] # as jinja2.pass_context does
    return checked


def _read(value: Any) -> Any:
    """A generator as a list, since its items can be read once; anything else as it is."""
    return list(value) if hasattr(value, "__next__") else value


def _refuse_large(name: str, value: Any, args: Iterable[Any], named: dict[str, Any]) -> None:
    given = [*args, *named.values()]
    if _called(name, value, given) > LARGEST:
        raise ValueError(f"the result of {name} is larger than {LARGEST:,} characters")


def _called(name: str, value: Any, given: list[Any]) -> int:
    """How large the result of a filter, or of a method of a string or number, would be at most, in characters."""
    numbers = [int(one) for one in given if isinstance(one, int)]
    length = len(value) if hasattr(value, "__len__") else 0
    if name in ("join", "~"):
        items = list(given[0]) if isinstance(value, str) and given else list(value)  # method, filter
        between = len(value) if isinstance(value, str) else max(map(_length, given), default=0)
        return sum(map(_length, items)) + between * len(items)
    if name in ("indent", "expandtabs"):
        width = max([0, *numbers, *(len(one) for one in given if isinstance(one, str))])
        return length + width * (1 + sum(map(str(value).count, "\n\t")))
    if name == "replace" and len(given) > 1:
        return length + str(value).count(str(given[0])) * _length(given[1])
    if name in ("format", "format_map"):
        wide = _WIDTH.search(str(value)) or (_NESTED.search(str(value)) and max(numbers, default=0) > LARGEST)
        return LARGEST + 1 if wide else 0
    return max(numbers, default=0)  # a width, such as that of center


def _length(value: Any) -> int:
    """Characters of a value as text, without writing down anything but a number or a container."""
    return len(value) if isinstance(value, str) else len(str(value))


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
    _limit_memory(first["memory"])
    try:
        template = Sandbox(datetime.fromisoformat(first["now"])).from_string(first["template"])
    except (jinja2.TemplateError, *_FAILURES) as fault:
        where = f"line {fault.lineno}: " if isinstance(fault, jinja2.TemplateSyntaxError) else ""
        _answer({"error": f"{type(fault).__name__}: {where}{line(fault)}"})
        return
    _answer({})
    for request in sys.stdin:
        try:
            answer: Any = [render(template, call, first["globals"]) for call in json.loads(request)]
        except MemoryError:
            answer = {"exhausted": True}
        _answer(answer)


def _limit_memory(size: int) -> None:
    """Let an allocation beyond `size` bytes fail, where the platform can; elsewhere the parent process looks on."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = size + _OVERHEAD
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _answer(document: Any) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
