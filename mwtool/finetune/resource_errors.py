"""Memory or disk at an end while a model trains: one line, with what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from mwtool.errors import MwtoolError, OutputError
from mwtool.finetune.config import Recipe

if TYPE_CHECKING:
    from mwtool.finetune.monitor import Watch


@contextmanager
def explained(recipe: Recipe, folder: Path, watch: Watch | None) -> Iterator[None]:
    """Raises MwtoolError where memory ends, OutputError where `folder` cannot be written; all else as it comes."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise _out_of_memory(recipe, 0 if watch is None else watch.step) from fault
    except (OSError, RuntimeError, SafetensorError) as fault:
        if _says(fault, "can't allocate memory", "out of memory"):
            raise _out_of_memory(recipe, 0 if watch is None else watch.step) from fault
        if (reason := _disk(fault)) is not None:
            raise OutputError(
                f"{folder} cannot be written: {reason}; make room, then continue with --resume"
            ) from fault
        raise


def _says(fault: BaseException, *words: str) -> bool:
    return any(word in str(fault).lower() for word in words)


def _disk(fault: BaseException) -> str | None:
    """What the disk said, through whichever library wrote; None where it was something else."""
    if isinstance(fault, OSError) and fault.errno is not None:
        return fault.strerror or os.strerror(fault.errno)
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        if _says(fault, os.strerror(number).lower()):
            return os.strerror(number)
    return (
        "the disk does not take all of it"
        if _says(fault, "pytorchstreamwriter", "inline_container", "ioerror", "iostream error")
        else None
    )


def _out_of_memory(recipe: Recipe, step: int) -> MwtoolError:
    lower = [f"--batch-size (now {recipe.at_once}; the effective batch stays {recipe.effective_batch})"]
    lower.append("--max-length")
    more = [] if recipe.gradient_checkpointing else ["--gradient-checkpointing"]
    more += [] if recipe.quantize else ["--quantize 4bit"]
    advice = f", or add {' or '.join(more)}" if more else ""
    return MwtoolError(f"out of memory in step {max(step, 1)}: lower {' or '.join(lower)}{advice}")
