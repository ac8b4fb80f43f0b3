"""A dataset of the Hub, or in one line why it could not be loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mwtool.errors import ModelNotFound, line_of

FOREIGN = (LookupError, TypeError, AttributeError, ArithmeticError)
"""What the libraries raise over answers that are not those of a Hub."""


def reaching(what: str, ask: Callable[[], Any], instead: str) -> Any:
    """What `ask` fetches; raises ModelNotFound, with what can be done instead, where it could not be loaded."""
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return ask()
    except (OSError, HTTPError, DatasetsError, ValueError, RuntimeError, *FOREIGN) as fault:
        raise ModelNotFound(f"{what} could not be loaded ({line_of(fault)}); {instead}") from fault
