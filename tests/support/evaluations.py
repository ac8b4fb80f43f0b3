"""Evaluation documents made up from samples: accuracies of questions, or losses of windows."""

from __future__ import annotations

import math
import statistics
from typing import Any

from mwtool.evaluation.document import SCHEMA, comparison_document


def accuracy(
    samples: list[float], *, task: str = "mc:x", metric: str = "acc", part: str | None = None
) -> dict[str, Any]:
    """An entry of `results` without its attack."""
    n = len(samples)
    return {
        "task": task, "part": part, "metric": metric, "value": statistics.fmean(samples),
        "stderr": statistics.stdev(samples) / math.sqrt(n) if n > 1 else None, "n": n, "seconds": 0.0,
        "nonfinite": None, "higher_is_better": True, "digest": f"{task}{part}{metric}", "setting": {},
        "samples": samples, "weights": None, "answers": [],
    }  # fmt: skip


def perplexity(losses: list[float], *, task: str = "ppl:x", digest: str = "windows") -> dict[str, Any]:
    """Summed losses of windows of 10 tokens."""
    value = math.exp(math.fsum(losses) / (10 * len(losses)))
    return {
        **accuracy(losses, task=task, metric="perplexity"), "value": value, "stderr": 0.1 * value,
        "weights": [10.0] * len(losses), "higher_is_better": False, "digest": digest, "setting": {"window": 10},
    }  # fmt: skip


def evaluation(model: str, **attacks: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of a model. attacks: what was measured under each; `zero` stands for `zero:1`."""
    names = {"none": "none", "zero": "zero:1", "retain": "retain:1"}
    results = [{"attack": names[attack], **one} for attack, found in attacks.items() for one in found]
    return {
        "schema": SCHEMA, "mwtool_version": "0", "model": model, "revision": None, "model_type": "llama",
        "dtype": "float32", "device": "cpu", "seed": 0, "versions": {}, "command": "mwtool eval", "adapter": None,
        "on": None, "attention": "sdpa", "bos": None,
        "options": {"limit": None, "protocol": None, "window": None, "delimiter": " ", "new_tokens": 8},
        "batch_size": None, "massive": None, "places": {}, "attacks": [names[attack] for attack in attacks],
        "tasks": sorted({one["task"] for one in results}), "complete": True, "results": results, "notes": [],
    }  # fmt: skip


def evaluated(model: str, **attacks: list[float]) -> dict[str, Any]:
    """The document of a model on one task of questions, each right or wrong."""
    return evaluation(model, **{attack: [accuracy(samples)] for attack, samples in attacks.items()})


def compared(*documents: dict[str, Any]) -> dict[str, Any]:
    """The comparison of these."""
    return comparison_document(documents, [one["model"] for one in documents], "mwtool eval --compare")
