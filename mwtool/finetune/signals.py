"""Ctrl-C and SIGTERM during training: the step in hand is finished and saved, then the run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStepEnd(TrainerCallback):
    """Has Trainer save and stop at the end of the step in which a signal came; in all processes at the same one.

    received: the signal's number. A second signal ends the process as it would without us.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted inside the block."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.received = _in_any_process(self.received, args.device)
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        return control

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_any_process(received: int | None, device: torch.device) -> int | None:
    """The largest number of a signal that reached one of the processes: stopping alone would leave the rest waiting."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return received
    largest = torch.tensor(received or 0, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest) or None
