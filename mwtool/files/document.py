"""Shared by all JSON documents: their first keys, how they are serialized, and numbers that are not finite."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from typing import Any

from mwtool._version import __version__


def envelope(
    schema: str,
    *,
    model: str,
    revision: str | None,
    model_type: str,
    dtype: str,
    device: str,
    seed: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """The first keys of every document: what was run, on which model, with which versions."""
    return {
        "schema": schema,
        "mwtool_version": __version__,
        "model": model,
        "revision": revision,
        "model_type": model_type,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "command": command,
    }


def text_of(document: dict[str, Any]) -> str:
    """The document as JSON text, in ASCII so that any terminal can print a tokenizer's characters.

    Raises ValueError for NaN or infinity, which documents never contain (see `finite`).
    """
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """The number if it is finite, else None: JSON has no NaN or infinity, and another key gives the reason."""
    return value if math.isfinite(value) else None
