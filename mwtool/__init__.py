"""mwtool: find, ablate and train against massive weights in large language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mwtool._version import __version__

if TYPE_CHECKING:
    from mwtool.ablation.plot import plot_ablation
    from mwtool.ablation.sweep import ablated
    from mwtool.errors import MwtoolError
    from mwtool.evaluation.config import EvalConfig
    from mwtool.evaluation.perplexity import Perplexity, measure_perplexity
    from mwtool.evaluation.plot import plot_evaluation
    from mwtool.evaluation.run import evaluate_models
    from mwtool.finetune.plot import plot_training
    from mwtool.macdrop.callback import MacDropCallback, guard
    from mwtool.macdrop.curriculum import Curriculum
    from mwtool.macdrop.curriculum_yaml import read_curriculum
    from mwtool.macdrop.engine import MacDrop
    from mwtool.macdrop.plot import plot_curriculum
    from mwtool.massive import MassiveWeights
    from mwtool.quantization.plot import plot_quantization
    from mwtool.scan.comparison.compare import Comparison, compare_scans
    from mwtool.scan.comparison.plot import plot_comparison
    from mwtool.scan.plot import plot_scan
    from mwtool.scan.scanner import Scan, scan_checkpoint, scan_model
    from mwtool.scan.settings import Settings, Texts, Thresholds
    from mwtool.scan.states_plot import plot_attention, plot_positions, plot_router, plot_sinks
    from mwtool.scan.tracking.plot import plot_track

# Where each public name lives; imported when first used, so that `mwtool --help` loads no torch.
_HOMES = {
    "Comparison": "mwtool.scan.comparison.compare",
    "Curriculum": "mwtool.macdrop.curriculum",
    "EvalConfig": "mwtool.evaluation.config",
    "MacDrop": "mwtool.macdrop.engine",
    "MacDropCallback": "mwtool.macdrop.callback",
    "MassiveWeights": "mwtool.massive",
    "MwtoolError": "mwtool.errors",
    "Perplexity": "mwtool.evaluation.perplexity",
    "Scan": "mwtool.scan.scanner",
    "Settings": "mwtool.scan.settings",
    "Texts": "mwtool.scan.settings",
    "Thresholds": "mwtool.scan.settings",
    "ablated": "mwtool.ablation.sweep",
    "compare_scans": "mwtool.scan.comparison.compare",
    "evaluate_models": "mwtool.evaluation.run",
    "guard": "mwtool.macdrop.callback",
    "measure_perplexity": "mwtool.evaluation.perplexity",
    "plot_ablation": "mwtool.ablation.plot",
    "plot_comparison": "mwtool.scan.comparison.plot",
    "plot_curriculum": "mwtool.macdrop.plot",
    "plot_evaluation": "mwtool.evaluation.plot",
    "plot_quantization": "mwtool.quantization.plot",
    "plot_attention": "mwtool.scan.states_plot",
    "plot_positions": "mwtool.scan.states_plot",
    "plot_router": "mwtool.scan.states_plot",
    "plot_scan": "mwtool.scan.plot",
    "plot_sinks": "mwtool.scan.states_plot",
    "plot_track": "mwtool.scan.tracking.plot",
    "plot_training": "mwtool.finetune.plot",
    "read_curriculum": "mwtool.macdrop.curriculum_yaml",
    "scan_checkpoint": "mwtool.scan.scanner",
    "scan_model": "mwtool.scan.scanner",
}

__all__ = [
    "Comparison",
    "Curriculum",
    "EvalConfig",
    "MacDrop",
    "MacDropCallback",
    "MassiveWeights",
    "MwtoolError",
    "Perplexity",
    "Scan",
    "Settings",
    "Texts",
    "Thresholds",
    "__version__",
    "ablated",
    "compare_scans",
    "evaluate_models",
    "guard",
    "measure_perplexity",
    "plot_ablation",
    "plot_attention",
    "plot_comparison",
    "plot_curriculum",
    "plot_evaluation",
    "plot_positions",
    "plot_quantization",
    "plot_router",
    "plot_scan",
    "plot_sinks",
    "plot_track",
    "plot_training",
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
