"""The steps of one job, here or in a process of its own, which imports libraries only after they are made quiet."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mwtool.errors import MwtoolError, line_of

FORESEEN = (MwtoolError, ImportError, OSError, RuntimeError, ValueError)
"""Failures of one step, out of memory among them, after which the others go on."""
Work = Callable[[], None]
_stop: Any = None
"""In a worker process: set when the study is interrupted."""


@dataclass(frozen=True, slots=True)
class Job:
    """One step, or the steps of one fine-tuning run in their order.

    name: as it is reported. steps: each with its command and what it does.
    """

    name: str
    steps: tuple[tuple[str, Work], ...]


class StepFailed(Exception):
    """A step that failed: its message and its command, which travel from a worker process."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message, command)
        self.command = command

    def __str__(self) -> str:
        return str(self.args[0])


def do(job: Job) -> None:
    """The steps of a job. Raises StepFailed, and KeyboardInterrupt where the study is interrupted."""
    for command, work in job.steps:
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
        try:
            work()
        except FORESEEN as fault:
            from mwtool.reproduction.steps import free

            free()
            raise StepFailed(line_of(fault, whole=True), command) from fault


def begin(first: Work | None, stop: Any) -> None:
    """Begin a worker process: `first` is called before anything is imported. Those side by side share the CPU."""
    global _stop  # noqa: PLW0603 - there is one study in a process
    _stop = stop
    if first is not None:
        first()
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
