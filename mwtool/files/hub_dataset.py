"""A dataset of the Hub, or in one line why it cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mwtool.errors import ModelNotFound, line_of


def reaching(what: str, ask: Callable[[], Any], instead: str) -> Any:
    """What `ask` fetches; raises ModelNotFound, with what can be done instead, where it cannot be had."""
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return ask()
    except (OSError, HTTPError, DatasetsError, ValueError, RuntimeError) as fault:
        raise ModelNotFound(f"{what} cannot be had ({line_of(fault)}); {instead}") from fault
