"""The commands as Typer runs them: spellings that users bring from other tools, and help that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from mwtool.cli import formats, waiting
from mwtool.cli.spelling import misspelled, respelled

REQUIRED = "Required"
"""Panel of the options without which a command cannot run; shown first."""
OPTIONS = "Options"
"""Heading of the options that name no panel."""
MODEL, OUTPUT = "Opening the model", "Configuration and output"
"""Panels that every command ends with."""
COLUMN = 26
"""Width of the column of names. Help behind a longer name begins on the next line, so that no name is ever cut."""
KEPT = "\xa0"
"""A space at which no line is broken."""
SHORT = 30
"""Notes on defaults that are not broken over two lines."""


class _Helpful:
    """What commands and groups share; a mixin of Typer's classes, which do the rest."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, description, arguments, options by panel, subcommands and examples."""
        command: Any = self
        command.format_usage(ctx, formatter)
        command.format_help_text(ctx, formatter)
        params = command.get_params(ctx)
        arguments = [(one.metavar or one.name, described(one)) for one in params if one.param_type_name == "argument"]
        subcommands = list(command.summaries()) if isinstance(command, Group) else []
        sections = [("Arguments", arguments), ("Commands", subcommands)]
        sections += [
            (heading, [(names_of(one), described(one)) for one in found]) for heading, found in _panels(params)
        ]
        names = [name for _, entries in sections for name, _ in entries]
        column = max(len(name) for name in names if len(name) <= COLUMN)
        for heading, entries in sections:
            if entries:
                lines = [line for entry in entries for line in _entry(*entry, column=column, width=formatter.width)]
                formatter.write("\n".join(["", f"{heading}:", *lines, ""]))
        if command.epilog:
            lines = [f"  {line}" for line in command.epilog.splitlines()]
            formatter.write("\n".join(["", "Examples:", *lines, ""]))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, in the spellings of other tools too. Raises BadParameter for an unknown option."""
        command: Any = self
        params, interspersed = command.get_params(ctx), not isinstance(self, TyperGroup)
        if not ctx.resilient_parsing:  # completing
            args = respelled(args, params, interspersed=interspersed)
            unknown = misspelled(args, params, interspersed=interspersed)
            if unknown is not None:
                ctx.fail(unknown)
            args, wrong = formats.read(args, params)
            if wrong is not None:
                ctx.fail(wrong)
        rest: list[str] = super().parse_args(ctx, args)  # type: ignore[misc] # Typer's, next in line
        return rest


class Command(_Helpful, TyperCommand):
    """One command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options; one that answers in JSON has `--format` as well, if it has no option of that name."""
        found: list[Any] = super().get_params(ctx)
        names = {name for one in found for name in one.opts}
        return [*found[:-1], formats.option(), found[-1]] if "--json" in names and "--format" not in names else found

    def invoke(self, ctx: Any) -> Any:
        """Run it; a line on the terminal says so until it writes something."""
        waiting.begin()
        try:
            return super().invoke(ctx)
        finally:
            waiting.clear()


class Group(_Helpful, TyperGroup):
    """A command with subcommands."""

    def summaries(self) -> Iterator[tuple[str, str]]:
        """Subcommands, and the first line of the help of each."""
        for name, one in self.commands.items():
            yield name, _first_line(one.help)


def names_of(option: Any) -> str:
    """An option's spellings, and what its value is: `--lora-r, --rank N`."""
    long = [name for name in option.opts if name.startswith("--")]
    names = ", ".join([name for name in option.opts if name not in long] + long)
    if option.secondary_opts:
        names += f" / {', '.join(option.secondary_opts)}"
    if option.is_flag:
        return names
    return f"{names} {option.metavar or _metavar(option)}"


def _metavar(option: Any) -> str:
    described = option.type_descriptor
    if described.is_choice:
        return "|".join(map(str, described.choices))
    return {"int": "N", "float": "X"}.get(option.bare_type(), "TEXT")


def described(param: Any) -> str:
    """A parameter's help, with its default and the limits of its value."""
    notes = []
    if isinstance(param.show_default, str):
        notes.append(f"default: {param.show_default}")
    elif param.show_default and param.default not in (None, (), []) and not getattr(param, "is_flag", False):
        notes.append(f"default: {_shown(param.default)}")
    if param.max is not None:
        notes.append(f"from {param.min} to {param.max}")
    if param.required:
        notes.append("required")
    note = f" [{'; '.join(notes)}]" if notes else ""
    return str(param.help) + (" " + note.strip().replace(" ", KEPT) if 0 < len(note) <= SHORT else note)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _panels(params: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Options by panel: those that are required first, those of every command last."""
    found: dict[str, list[Any]] = {REQUIRED: [], OPTIONS: []}
    ends: dict[str, list[Any]] = {MODEL: [], OUTPUT: []}
    shares_output = any(getattr(param, "rich_help_panel", None) == OUTPUT for param in params)
    for param in params:
        if param.param_type_name != "option" or param.hidden:
            continue
        panel = param.rich_help_panel or (OUTPUT if param.name == "help" and shares_output else OPTIONS)
        (ends if panel in ends else found).setdefault(panel, []).append(param)
    for heading, options in {**found, **ends}.items():
        if options:
            yield heading, options


def _entry(name: str, text: str, *, column: int, width: int) -> list[str]:
    """A name, and its help beside it; no option is broken at its hyphens."""
    indent = " " * (column + 4)
    beside = f"  {name:{column}}  " if len(name) <= column else indent
    wrapped = textwrap.wrap(
        text, width, initial_indent=beside, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    lines = [line.replace(KEPT, " ") for line in wrapped]
    return lines if len(name) <= column else [f"  {name}", *lines]


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n\n")[0].replace("\n", " ")
