"""`mwtool finetune` on a tiny model: its arguments, and what a run leaves."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from command import Ran, run

QUICK = "--rank 4 --lr 1e-2 --max-length 16 --batch-size 2 --effective-batch 4 --dropout 0.1 --device cpu".split()


def arguments(folder: Path, *more: object) -> list[object]:
    return ["finetune", folder, "--data", folder / "text.txt", *QUICK, *more]


def finetune(folder: Path, *more: object) -> Ran:
    return run(*arguments(folder, *more))


def weights(run_folder: Path) -> str:
    return sha256((run_folder / "adapter_model.safetensors").read_bytes()).hexdigest()
