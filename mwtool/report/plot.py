"""The figure of a document, by its schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mwtool.ablation.plot import plot_ablation
from mwtool.errors import BadValue
from mwtool.evaluation.document import COMPARISON
from mwtool.evaluation.document import SCHEMA as EVALUATION
from mwtool.evaluation.plot import plot_evaluation
from mwtool.finetune.config import SCHEMA as TRAINING
from mwtool.finetune.plot import plot_training
from mwtool.massive import ABLATION
from mwtool.massive import SCHEMA as SCAN
from mwtool.quantization.document import SCHEMA as QUANTIZATION
from mwtool.quantization.plot import plot_quantization
from mwtool.scan.comparison.document import SCHEMA as SCANS
from mwtool.scan.comparison.plot import plot_comparison
from mwtool.scan.plot import plot_scan
from mwtool.scan.tracking.document import SCHEMA as TRACK
from mwtool.scan.tracking.plot import plot_track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS: Mapping[str, Callable[[Mapping[str, Any]], Figure]] = {
    SCAN: plot_scan,
    SCANS: plot_comparison,
    TRACK: plot_track,
    ABLATION: plot_ablation,
    TRAINING: plot_training,
    EVALUATION: plot_evaluation,
    COMPARISON: plot_evaluation,
    QUANTIZATION: plot_quantization,
}


def figure_of(document: Mapping[str, Any]) -> Figure:
    """The figure of a document whose schema is in `PLOTS`. Raises BadValue for another one."""
    schema = document.get("schema")
    if not isinstance(schema, str) or schema not in PLOTS:
        raise BadValue(f"a document of schema {schema!r} has no figure; expected one of {', '.join(PLOTS)}")
    return PLOTS[schema](document)
