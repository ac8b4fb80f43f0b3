"""How a command answers: for people, for programs that read text, as JSON, or with nothing, as the hf CLI has it.

`--format json` equals `--json`. Without the option it is `agent` where AI_AGENT or AGENT is set, the variables that any
coding agent may set for what it runs, else `human`. Nothing is asked of the Hub for this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args

import typer

Mode = Literal["human", "agent", "json", "quiet"]
Asked = Literal["auto", "human", "agent", "json", "quiet"]
AGENTS = ("AI_AGENT", "AGENT")
HELP = "How to answer: human; agent (plain text, no progress bars); json, as --json; quiet (files and errors only)."
_mode: Mode = "human"


def mode() -> Mode:
    """That of the command that runs."""
    return _mode


@cache
def option() -> Any:
    """The option `--format`, as Typer holds it; `read` acts on it."""
    made = typer.Typer()

    def _format(
        output_format: Annotated[
            Asked, typer.Option("--format", help=HELP, rich_help_panel="Configuration and output")
        ] = "auto",
    ) -> None:
        """Only its parameter is used."""

    made.command()(_format)
    (found,) = (one for one in typer.main.get_command(made).params if "--format" in one.opts)
    found.expose_value = False
    return found


def read(arguments: Sequence[str], params: Sequence[Any]) -> tuple[list[str], str | None]:
    """Set the mode of a command; its arguments with `--json` where that is the format, and what is wrong with them.

    arguments: as `respelled` gives them. Where `--format` says how data is formatted, a value that is one of these is
    taken for the answer's. A command that has no `--json` is for people.
    """
    global _mode  # noqa: PLW0603 - a process runs one command
    if not any(one.name == "json" for one in params):
        _mode = "human"
        return list(arguments), None
    end = arguments.index("--") if "--" in arguments else len(arguments)
    here, rest = list(arguments[:end]), list(arguments[end:])
    answers = option() in params
    asked: str | None = None
    for argument in list(here):
        value = argument.removeprefix("--format=")
        if value != argument and value in get_args(Mode if not answers else Asked):
            asked = value
            if not answers:
                here.remove(argument)
    if asked not in (None, "auto", "json") and "--json" in here:
        return [*here, *rest], f"--json and --format {asked} exclude each other; give one of them"
    if asked == "json" and "--json" not in here:
        here.append("--json")
    chosen: Any = asked if asked in get_args(Mode) else "json" if "--json" in here else _detected()
    _mode = chosen
    return [*here, *rest], None


def _detected() -> Mode:
    return "agent" if any(os.environ.get(name, "").strip() for name in AGENTS) else "human"
