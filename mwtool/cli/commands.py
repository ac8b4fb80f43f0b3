"""The subcommands by name, each imported when it is first asked for: `mwtool --help` needs only what it prints.

Importing every command takes as long as importing Typer, most of it for the classes that hold the defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import typer
from typer.main import get_command

from mwtool.cli.command import Group

SUMMARIES = {
    "scan": "Find the massive weights of a model, one decoder layer in memory at a time.",
    "ablate": "Zero, scale or replace massive rows and measure the effect, next to control rows.",
    "eval": "Measure perplexity and zero-shot tasks of a model, attacked or not.",
    "finetune": "Train a LoRA or DoRA adapter with MacDrop.",
    "track": "Follow how massive weights emerge over the checkpoints of a training run.",
    "compare": "Lay two scans side by side: which events and rows are kept, moved, lost or new.",
    "quantize-check": "Measure what quantizing costs, and how much of it a few protected weights give back.",
    "export": "Write a scan's events for a quantization tool: whole FFN matrices, or columns as a PEFT adapter.",
    "report": "Gather what was measured of one model in one HTML page.",
    "reproduce": "Run the paper's study of one model and write it on one page.",
    "adapters": "List the supported model types; check an adapter, or start a new one.",
}
"""Command -> the first line of its help, which a test compares with the command's own."""


class LazyCommands(dict[str, Any]):
    """Command -> what runs it: the module `mwtool.cli.NAME` is imported when its command is looked up."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(SUMMARIES))

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is None:
            module = import_module(f"mwtool.cli.{name.replace('-', '_')}")
            found = get_command(module.app)
            found.name = name
            self[name] = found
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """As for any dictionary."""
        return self[name] if name in self else default  # noqa: SIM401 - `dict.get` would not import it


class LazyGroup(Group):
    """mwtool itself: a group whose commands are imported when they are needed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = LazyCommands()

    def summaries(self) -> Iterator[tuple[str, str]]:
        """Commands and their summaries, without importing them."""
        yield from SUMMARIES.items()


def single(**options: Any) -> typer.Typer:
    """A Typer for one command, or for one group of them, without options of its own."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )
