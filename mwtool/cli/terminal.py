"""What goes to stderr: progress, notes, errors."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from mwtool.cli import formats, process, waiting

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mwtool.finetune.monitor import Step

_stderr = Console(stderr=True, soft_wrap=True, quiet=not process.first())
"""Of several processes that train together, the first one shows progress and notes."""


REDIRECTED = 120
"""Columns where stdout is a file or a pipe and COLUMNS says nothing: there is no terminal that tables must fit."""


def report_console() -> Console:
    """stdout for people: names are shown as they are, whatever Rich would read into their brackets and colons."""
    waiting.clear()
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed
    width = None if terminal or "COLUMNS" in os.environ else REDIRECTED
    if formats.mode() == "agent":
        return Console(width=width, markup=False, emoji=False, force_terminal=False, color_system=None)
    return Console(width=width, markup=False, emoji=False, quiet=formats.mode() == "quiet")


def progressing() -> bool:
    """Whether bars are drawn: for people, on a terminal."""
    return _stderr.is_terminal and formats.mode() in ("human", "json")


def note(line: str) -> None:
    """Something decided on the user's behalf, or worth knowing."""
    waiting.clear()
    if formats.mode() != "quiet":
        _stderr.print(Text.assemble(("note: ", "dim"), line))


def note_all(lines: Iterable[str]) -> None:
    """Each once, in their order."""
    for line in dict.fromkeys(lines):
        note(line)


def tell(shown: RenderableType) -> None:
    """Something that is not the result, such as a plan before it runs."""
    waiting.clear()
    if formats.mode() != "quiet":
        _stderr.print(shown)


def fail(line: str) -> None:
    """One line, whatever the message holds."""
    waiting.clear()
    where = "" if process.first() else f"process {process.rank()}: "
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), where, " ".join(line.split())))


def quiet_libraries() -> None:
    """What libraries say to those who program with them is not for those who run a command."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's use of it
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf")  # PEFT: a GGUF has none
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it does without
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


def say_once() -> None:
    """What libraries log themselves is shown once: bitsandbytes would say the same at every product of a forward.

    Which kernels it does without, which it says as soon as PEFT imports it, is not shown at all.
    """
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    handler = logging.lastResort
    if handler is not None and not any(isinstance(one, _Once) for one in handler.filters):
        handler.addFilter(_Once())


def command_line() -> str:
    """What was typed, fit to be typed again."""
    return shlex.join(["mwtool", *sys.argv[1:]])


@dataclass(frozen=True, slots=True)
class ScanBar:
    """What a scan calls as it goes: after a layer, and as bytes of weights are read or arrive."""

    on_layer: Callable[[int, int, int], None]
    on_bytes: Callable[[int, int], None]


@contextmanager
def layer_progress() -> Iterator[ScanBar]:
    """A bar over the bytes of weights, with layers, speed and time left; nothing where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[layers]}"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    waiting.clear()
    told: list[int] = []
    with Progress(*columns, console=_stderr, transient=True, disable=not progressing()) as progress:
        task = progress.add_task("scanning", total=None, layers="")

        def on_bytes(done: int, total: int) -> None:
            if done > total or not told or abs(total - told[0]) > DIFFERENT * total:  # a new total restarts the speed
                told[:] = [total]
            progress.update(task, completed=done, total=told[0])

        def on_layer(done: int, total: int, read: int) -> None:
            progress.update(task, layers=f"layer {done} of {total},")
            if not told:  # nobody counts bytes
                progress.update(task, completed=read, total=read * total // max(done, 1))

        yield ScanBar(on_layer, on_bytes)


DIFFERENT = 0.02
"""Part by which a total has to change to be shown anew."""


@contextmanager
def step_progress() -> Iterator[Callable[[Step], None]]:
    """A bar over training steps with loss, p and step time; where stderr is no terminal, a line a logged loss."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed:.0f} of {task.total:.0f}{task.fields[said]}"),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    waiting.clear()
    with Progress(*columns, console=_stderr, transient=True, disable=not progressing()) as progress:
        task = progress.add_task("training", total=1, said="")

        def on_step(at: Step) -> None:
            loss = "" if at.loss is None else f", loss {at.loss:.4f}"
            said = f"{loss}{'' if at.p is None else f', p {at.p:.3f}'}, {at.seconds:.3g} s a step"
            progress.update(task, completed=at.step, total=at.steps, said=said)
            if at.logged and not progressing() and formats.mode() != "quiet":
                left = (at.steps - at.step) * at.mean
                _stderr.print(f"step {at.step} of {at.steps}{said}, {left:,.0f} s left", highlight=False)

        yield on_step


@contextmanager
def run_progress() -> Iterator[Callable[[int, int, str], Callable[[int, int], None]]]:
    """A bar over runs, within a run over its windows; nothing where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[run]} of {task.fields[runs]} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    waiting.clear()
    with Progress(*columns, console=_stderr, transient=True, disable=not progressing()) as progress:
        task = progress.add_task("measuring", total=None, run=0, runs="?")

        def on_run(done: int, total: int, name: str) -> Callable[[int, int], None]:
            progress.update(task, description=name, run=done + 1, runs=total, completed=done, total=total)

            def on_part(part: int, parts: int) -> None:
                progress.update(task, completed=done + part / parts)

            return on_part

        yield on_run
