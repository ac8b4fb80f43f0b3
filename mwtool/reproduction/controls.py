"""Cells of random rows under the same attack, from the sweeps beside controls: means over their draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mwtool.reproduction.statistics import Span, over_seeds


def control_cell(document: Mapping[str, Any], attack: str, tasks: Sequence[str]) -> dict[str, Any] | None:
    """The mean over the draws of random rows, and its change beside the unchanged model; None where none was drawn.

    document: an ablation. attack: such as `zero:5`. tasks: keys of its results, one, or those a mean is taken over.
    """
    mode, _, k = attack.rpartition(":")
    runs = [
        run
        for run in document["runs"]
        if (run["mode"], run["k"]) == (mode, int(k)) and str(run["control"]).startswith("random")
    ]
    if not runs or not tasks:
        return None
    log = all(not task["higher_is_better"] for task in document["tasks"] if task["name"] in tasks)
    values = [_mean(run["results"], tasks, log=log) for run in runs]
    plain = _mean(document["baseline"], tasks, log=log)
    if plain is None or any(value is None for value in values):
        return None
    known = [value for value in values if value is not None]
    span = over_seeds([math.log(one) for one in known]).mapped(math.exp) if log else over_seeds(known)
    change = Span(span.value, span.low, span.high).mapped(lambda one: one / plain if log else one - plain)
    return {
        "value": span.value,
        "interval": span.interval,
        "over": "draws",
        "seeds": [int(run["control"].partition(":")[2]) for run in runs],
        "values": list(known),
        "change": {
            "kind": "ratio" if log else "points",
            "value": change.value,
            "interval": change.interval,
            "over": "draws",
        },
        "nonfinite": None,
    }


def _mean(results: Mapping[str, float | None], tasks: Sequence[str], *, log: bool) -> float | None:
    """A perplexity, or the mean accuracy in percent; None where one is not finite."""
    found = [results[task] for task in tasks]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return known[0] if log else 100 * statistics.fmean(known)
