"""Cells of a table: a mean over seeds or over examples with its 95 % interval, and its change beside another cell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mwtool.evaluation.comparison import paired, student_t
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.task_mean import TaskMean

NORMAL = 1.96
BySeed = Mapping[int, tuple[Measured, ...]]
"""Seed -> the measurements a cell is the mean of: one, or one of each zero-shot task."""


@dataclass(frozen=True, slots=True)
class Span:
    """A value with its 95 % interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def mapped(self, function: Any) -> Span:
        """Of another scale: each bound, and the value, through a rising function."""
        ends = [None if one is None else function(one) for one in (self.low, self.high)]
        return Span(function(self.value), ends[0], ends[1])

    @property
    def interval(self) -> list[float] | None:
        """Both bounds, as documents have them."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def over_seeds(values: Sequence[float]) -> Span:
    """mean +- t s / sqrt(n) over n seeds; no interval for one."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom < 1:
        return Span(mean)
    half = student_t(freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return Span(mean, mean - half, mean + half)


def cell_of(found: BySeed, beside: BySeed | None = None) -> dict[str, Any] | None:
    """A cell of the document, compared with `beside` on the same seeds; None where nothing was measured."""
    if not found:
        return None
    bad = next((one.nonfinite for several in found.values() for one in several if one.nonfinite), None)
    first = next(iter(found.values()))
    values = {seed: _value(several) for seed, several in found.items()}
    span = None
    if bad is None:
        span = _of_seeds(list(values.values()), log=_is_log(first)) if len(found) > 1 else _of_examples(first)
    return {
        "value": None if span is None else span.value,
        "interval": None if span is None else span.interval,
        "over": "seeds" if len(found) > 1 else "examples",
        "seeds": sorted(found),
        "values": [values[seed] if math.isfinite(values[seed]) else None for seed in sorted(found)],
        "change": None if bad or not beside else _change(found, beside),
        "nonfinite": bad,
    }


def _is_log(measured: Sequence[Measured]) -> bool:
    """Perplexities are averaged and compared as logarithms."""
    return measured[0].weights is not None


def _value(measured: Sequence[Measured]) -> float:
    """A perplexity; or the mean accuracy in percent."""
    values = [one.value for one in measured]
    return values[0] if _is_log(measured) else 100 * statistics.fmean(values)


def _of_seeds(values: Sequence[float], *, log: bool) -> Span:
    return over_seeds([math.log(one) for one in values]).mapped(math.exp) if log else over_seeds(values)


def _of_examples(measured: Sequence[Measured]) -> Span:
    """From the standard errors of one model: that of ln of a perplexity, and of the mean of several tasks."""
    error, value = _mean_of(measured).stderr, _value(measured)
    if error is None:
        return Span(value)
    if _is_log(measured):
        half = NORMAL * error / value
        return Span(value, value * math.exp(-half), value * math.exp(half))
    half = NORMAL * 100 * error
    return Span(value, value - half, value + half)


def _change(found: BySeed, beside: BySeed) -> dict[str, Any] | None:
    """Over the seeds both have; a model without seeds, such as the original, stands beside all of them."""
    pairs = [
        (several, beside.get(seed, beside[min(beside)] if len(beside) == 1 else ()))
        for seed, several in sorted(found.items())
    ]
    pairs = [(one, other) for one, other in pairs if other and not any(each.nonfinite for each in other)]
    if not pairs:
        return None
    log = _is_log(pairs[0][0])
    if len(pairs) == 1:
        span = _paired(*pairs[0])
    elif log:
        span = over_seeds([math.log(_value(one) / _value(other)) for one, other in pairs]).mapped(math.exp)
    else:
        span = over_seeds([_value(one) - _value(other) for one, other in pairs])
    return None if span is None else {
        "kind": "ratio" if log else "points",
        "value": span.value,
        "interval": span.interval,
        "over": "seeds" if len(pairs) > 1 else "examples",
    }  # fmt: skip


def _paired(one: Sequence[Measured], other: Sequence[Measured]) -> Span | None:
    """On the same examples: of one metric as `paired` has it, of several tasks the mean of their differences."""
    found = paired(one[0], other[0]) if len(one) == len(other) == 1 else _mean_of(one).beside(_mean_of(other))
    return None if found is None else Span(found.value, found.low, found.high)


def _mean_of(measured: Sequence[Measured]) -> TaskMean:
    """Of a text, or of the zero-shot tasks, whose accuracies may be different metrics: acc_norm and acc."""
    return TaskMean(measured[0].metric, tuple(measured))
