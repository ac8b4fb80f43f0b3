"""What all JSON documents share: the keys they begin with, how they are printed, and numbers that are not finite."""

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
    """What every document begins with: enough to tell what was run on what."""
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
    """The document as it is printed and written, in ASCII: a terminal need not know a tokenizer's characters.

    Numbers are finite by construction; anything else is a bug.
    """
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """A number as JSON can hold it: one that is not finite is null, and another key says why."""
    return value if math.isfinite(value) else None
