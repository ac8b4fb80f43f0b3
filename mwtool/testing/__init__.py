"""The conformance checks for architecture adapters, and a template for new ones.

A plugin calls `check_adapter` in its tests:

    from mwtool.testing import check_adapter, tiny_config

Imports only from scan and surgery, and from what these may import. The names below are imported on first use, so
that `mwtool adapters` lists adapters without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mwtool.testing.kit import Check as Check
    from mwtool.testing.kit import Conformance as Conformance
    from mwtool.testing.kit import check_adapter as check_adapter
    from mwtool.testing.kit import check_type as check_type
    from mwtool.testing.kit import random_model as random_model
    from mwtool.testing.kit import run_checks as run_checks
    from mwtool.testing.kit import tiny_config as tiny_config

__all__ = ["Check", "Conformance", "check_adapter", "check_type", "random_model", "run_checks", "tiny_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mwtool.testing.kit"), name)
