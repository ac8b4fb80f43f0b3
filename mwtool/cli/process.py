"""In a distributed run: which process this is, and the device and precision it trains with."""

from __future__ import annotations

import os

import typer

from mwtool.cli.options import usable
from mwtool.models.load_options import DType


def rank() -> str:
    """Number of this process, from 0, as set by the launcher."""
    return os.environ.get("RANK", "0")


def first() -> bool:
    """Whether it is the process that prints and writes for all."""
    return rank() == "0"


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end() -> None:
    """Leave the group of processes, where there is one: torch warns on stderr about a group that is still there."""
    if count() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def training_device(asked: str) -> str:
    """The device to train on; under a launcher each process has its own GPU."""
    import torch

    if asked not in ("auto", "cpu", "cuda", "mps"):
        raise typer.BadParameter(
            f"--device {asked!r}: expected auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES selects a GPU"
        )
    if asked == "auto":
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        asked = "cpu" if on_cpu else found
    card = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if asked == "cuda" else asked
    return usable(card)


def training_precision(asked: DType, device: str) -> DType:
    """The requested precision; for `auto` bfloat16 where the hardware supports it without emulation, else float32."""
    if asked != "auto":
        return asked
    import torch

    able = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"
