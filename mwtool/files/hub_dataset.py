"""Loading datasets from the Hub, with failures reported in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mwtool.errors import ModelNotFound, line_of

FOREIGN = (LookupError, TypeError, AttributeError, ArithmeticError)
"""What the libraries raise over answers that are not those of a Hub."""


def load_from_hub(what: str, load: Callable[[], Any], instead: str) -> Any:
    """What `load` returns. Raises ModelNotFound if it fails; the message names `what` and suggests `instead`."""
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return load()
    except (OSError, HTTPError, DatasetsError, ValueError, RuntimeError, *FOREIGN) as fault:
        raise ModelNotFound(f"{what} could not be loaded ({line_of(fault)}); {instead}") from fault
