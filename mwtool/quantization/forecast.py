"""What a check of quantization will run, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import prepare
from mwtool.evaluation.forecast import Forecast, forecast
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.trial import States
from mwtool.quantization.check import protections_for
from mwtool.quantization.config import QuantizeConfig
from mwtool.quantization.simulation import linear_weights, quantized

if TYPE_CHECKING:
    from mwtool.evaluation.tasks import Task
    from mwtool.models.load import Loaded
    from mwtool.scan.scanner import Scan


def forecast_check(
    loaded: Loaded, scan: Scan, tasks: Sequence[Task], plan: QuantizeConfig, options: Options
) -> Forecast:
    """What `quantize_check` will run with the same arguments, and about what it takes. Raises what that raises."""
    protections = tuple(protections_for(loaded, scan, plan))
    weights = linear_weights(loaded.base, loaded.layers)
    masks = {id(mask): mask for one in protections for mask in one.masks.values()}
    attacked = [
        Variant(0, partial(quantized, loaded.base, weights, scheme, {} if one is None else one.masks))
        for scheme in plan.schemes
        for one in (None, *protections)
    ]
    states = States(
        attacked=attacked,
        first=Variant(0, nullcontext),
        held=sum(mask.numel() * mask.element_size() for mask in masks.values()),
        said={
            "full precision": 1,
            "quantized": len(plan.schemes),
            "protected": sum(not one.control for one in protections) * len(plan.schemes),
            "controls": sum(one.control for one in protections) * len(plan.schemes),
        },
    )
    return forecast(loaded, prepare(loaded, tasks, options), states, options)
