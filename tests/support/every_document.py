"""A document of every kind that a page shows, all of one model: a quick scan and sweep, the rest made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from evaluations import accuracy, compared, evaluation, perplexity
from sweeps import swept
from words import planted

import mwtool
from mwtool.ablation.sweep import Sweep
from mwtool.finetune.config import SCHEMA, Recipe
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.quantization.document import SCHEMA as QUANTIZATION
from mwtool.scan.comparison.compare import compare_scans
from mwtool.scan.settings import Texts

RIGHT, WRONG = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
PROTECTED = (
    (None, False, None),
    ("2 columns of down_proj, layers 1, 2, 9, 11, 28, 29", False, 0.11),
    ("2 random columns of down_proj, layers 1, 2, 9, 11, 28, 29", True, -0.01),
    ("FFN matrices, layers 1, 2, 9, 11, 28, 29", False, 0.45),
)


def every_document(folder: Path, model: str = "owner/name") -> list[dict[str, Any]]:
    """Scan and its comparison, ablation, quantization check, fine-tuning, evaluation and comparison of `model`."""
    loaded = planted(folder)
    file = str(folder / "text.txt")
    texts = Texts(positions="w1 w2 w3", attention=True, sinks=file, sink_length=8, triggers=file, length=16, windows=2)
    scanned = mwtool.scan_model(loaded.base, loaded.tokenizer, mwtool.Settings(texts=texts))
    beside = compare_scans(scanned, {**scanned.to_dict(), "model": "another/model"}).to_dict()
    attacked = swept(loaded, Sweep(ks=(1, 2), draws=2)).to_dict()
    measured = evaluation(
        model,
        none=[perplexity([20.0, 21.0, 22.0, 23.0]), accuracy(RIGHT)],
        zero=[perplexity([27.0, 28.0, 28.0, 30.0]), accuracy(WRONG)],
    )
    other = evaluation("another/model", none=[accuracy(WRONG)])
    found = [scanned.to_dict(), beside, attacked, quantization(), training(scanned.to_dict()["massive"]), measured]
    return [
        *({**one, "model": model, "command": f"mwtool command {model}"} for one in found), compared(measured, other)
    ]  # fmt: skip


def head(schema: str) -> dict[str, Any]:
    """The first keys of a document."""
    return {
        "schema": schema, "mwtool_version": "0", "model": "owner/name", "revision": None, "model_type": "llama",
        "dtype": "bfloat16", "device": "cpu", "seed": 0, "versions": {"torch": "2"}, "command": None,
    }  # fmt: skip


def quantization() -> dict[str, Any]:
    """A quantization check of one task."""
    result = perplexity([20.0, 21.0, 22.0, 23.0])
    variants = [
        {
            "bits": bits, "protected": name, "kind": name, "k": None, "control": control, "kept_weights": 2000,
            "kept_bytes": 1234, "results": [result], "ratios": [{"value": 1.5, "low": 1.4, "high": 1.6}],
            "shares_given_back": [share and {"value": share, "low": share - 0.05, "high": share + 0.05}],
        }
        for bits in (4, 3)
        for name, control, share in PROTECTED
    ]  # fmt: skip
    return {
        **head(QUANTIZATION), "adapter": None, "on": None, "method": "round to nearest", "group": 64,
        "levels": "symmetric",
        "quantized_weights": 4_423_680, "baseline": [result], "variants": variants,
        "verdicts": ["4 bits in groups of 64: keeping FFN matrices gives back 45% [40%, 50%]; it pays."], "notes": [],
    }  # fmt: skip


def training(massive: dict[str, Any], steps: int = 30) -> dict[str, Any]:
    """A fine-tuning run whose loss falls."""
    log: list[dict[str, Any]] = [{"step": at, "loss": 2 + math.exp(-at / 9)} for at in range(1, steps + 1)]
    log += [{"step": at, "eval_loss": 2.1 + math.exp(-at / 9)} for at in (0, 15, 30)]
    losses = {"first_loss": 2.9, "last_loss": 2.04, "first_eval_loss": 3.1, "last_eval_loss": 2.14}
    counts = dict.fromkeys(("cut", "unreadable", "too_long", "too_short", "untrained"), 0)
    data = {
        "name": "alpaca.json", "form": "alpaca", "digest": "d", "rows": 8, "trained_rows": 8, **counts, "left_out": [],
        "date": None, "sequences": 8, "held_out": 0, "trained_tokens": 80,
    }  # fmt: skip
    return {
        **head(SCHEMA), "settings": Recipe().document(), "steps": steps, "steps_per_epoch": steps, "processes": 1,
        "data": data, "how": "weights", "p": list(curriculum_of("step:0.8").values(steps)), "log": log,
        "massive": massive, "places": [massive], "rows": [1, 2],
        "measured": {**losses, "step_seconds": 0.5, "macdrop_seconds": 0.001}, "notes": ["a note"],
    }  # fmt: skip
