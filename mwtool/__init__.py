"""mwtool: find, ablate and train against massive weights in large language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mwtool._version import __version__

if TYPE_CHECKING:
    from mwtool.ablate import ablated
    from mwtool.analysis import Thresholds
    from mwtool.callback import MacDropCallback, guard
    from mwtool.curriculum import Curriculum
    from mwtool.curriculum_file import read_curriculum
    from mwtool.errors import MwtoolError
    from mwtool.macdrop import MacDrop
    from mwtool.massive import MassiveWeights
    from mwtool.perplexity import Perplexity, measure_perplexity
    from mwtool.scan import Scan, Settings, scan_checkpoint, scan_model

# Where each public name lives; imported when first used, so that `mwtool --help` loads no torch.
_HOMES = {
    "Curriculum": "mwtool.curriculum",
    "MacDrop": "mwtool.macdrop",
    "MacDropCallback": "mwtool.callback",
    "MassiveWeights": "mwtool.massive",
    "MwtoolError": "mwtool.errors",
    "Perplexity": "mwtool.perplexity",
    "Scan": "mwtool.scan",
    "Settings": "mwtool.scan",
    "Thresholds": "mwtool.analysis",
    "ablated": "mwtool.ablate",
    "guard": "mwtool.callback",
    "measure_perplexity": "mwtool.perplexity",
    "read_curriculum": "mwtool.curriculum_file",
    "scan_checkpoint": "mwtool.scan",
    "scan_model": "mwtool.scan",
}

__all__ = [
    "Curriculum",
    "MacDrop",
    "MacDropCallback",
    "MassiveWeights",
    "MwtoolError",
    "Perplexity",
    "Scan",
    "Settings",
    "Thresholds",
    "__version__",
    "ablated",
    "guard",
    "measure_perplexity",
    "read_curriculum",
    "scan_checkpoint",
    "scan_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
