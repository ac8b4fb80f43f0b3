"""Paired comparison of two metrics on the same examples: ratio or difference, with a confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.numbers import fine


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The paired comparison of a metric with a reference.

    kind: `ratio` of perplexities, difference of accuracies in percentage `points`, or `difference` of other means.
    low, high: 95 % confidence interval over the shared examples; None if there are too few.
    """

    kind: Literal["ratio", "points", "difference"]
    value: float
    low: float | None
    high: float | None
    n: int


def paired(one: Measured, other: Measured) -> Paired | None:
    """Compare `one` with the reference `other`; None unless both are finite and measured on the same examples."""
    if one.digest is None or one.digest != other.digest or one.metric != other.metric or one.part != other.part:
        return None
    if one.nonfinite or other.nonfinite or not one.samples or len(one.samples) != len(other.samples):
        return None
    if one.weights is not None:
        if not comparable(one, other):
            return None
        ratio = paired_ratio(one, [other])
        return Paired(kind="ratio", value=ratio.value, low=ratio.low, high=ratio.high, n=one.n)
    return _difference(one, other)


def _difference(one: Measured, other: Measured) -> Paired:
    """The mean of the differences d_i between samples, +- t SE, with SE^2 = var(d) / n."""
    counted = is_accuracy(one) and is_accuracy(other)
    scale = 100 if counted else 1
    differences = [scale * (a - b) for a, b in zip(one.samples, other.samples, strict=True)]
    mean, n = math.fsum(differences) / len(differences), len(differences)
    kind: Literal["points", "difference"] = "points" if counted else "difference"
    if n < LEAST:
        return Paired(kind=kind, value=mean, low=None, high=None, n=n)
    half = student_t(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Paired(kind=kind, value=mean, low=mean - half, high=mean + half, n=n)


def is_accuracy(one: Measured) -> bool:
    """Whether the metric is a share of examples, each right or wrong."""
    shares = one.weights is None and bool(one.samples) and all(value in (0, 1) for value in one.samples)
    return shares and not _scored(one)  # all of whose scores may be 1


def is_number(one: Measured) -> bool:
    """Whether a metric belongs in a table; of answers that nobody scored only the length is measured."""
    return not one.answers or _scored(one)


def _scored(one: Measured) -> bool:
    """Whether answers were scored, by a judge or beside right ones."""
    return "judge" in one.setting or "longbench" in one.setting


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric of one model under one attack."""

    model: str
    attack: str
    measured: Measured

    @property
    def key(self) -> tuple[str, str | None, str]:
        """Task, part and metric."""
        return self.measured.task, self.measured.part, self.measured.metric


def compare_with_first(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry, Paired | None]]:
    """Every entry but the first of its task, part and metric, with that first one and their comparison."""
    first: dict[tuple[str, str | None, str], Entry] = {}
    for entry in entries:
        reference = first.setdefault(entry.key, entry)
        if reference is not entry:
            yield entry, reference, paired(entry.measured, reference.measured)


LEVEL = 0.95
"""Confidence level of every interval."""
LEAST = 4
"""Fewest samples for an interval: below, `student_t` is not accurate enough."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Attacked over baseline perplexity with its 95 % confidence interval over windows; None if there are too few."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{fine(self.low)}, {fine(self.high)}]"
        return f"{fine(self.value)}{interval}"


def comparable(one: Measured, other: Measured) -> bool:
    """Whether both are finite perplexities on the same windows."""
    return (
        one.weights is not None
        and not one.nonfinite
        and not other.nonfinite
        and (one.digest, one.weights) == (other.digest, other.weights)
    )


def paired_ratio(attacked: Measured, baseline: Sequence[Measured]) -> Ratio:
    """Perplexity over that of `baseline` (over the geometric mean of several), with a paired interval.

    With d_i the difference in summed -ln p of window i and n_i its tokens: D = sum d / sum n, with the variance of a
    ratio of sums, and the interval exp(D +- t SE) with n - 1 degrees of freedom.
    """
    assert attacked.weights is not None, "a perplexity"
    counts = attacked.weights
    others = [math.fsum(values) / len(baseline) for values in zip(*(one.samples for one in baseline), strict=True)]
    differences = [a - b for a, b in zip(attacked.samples, others, strict=True)]
    total, n = math.fsum(counts), len(counts)
    mean = math.fsum(differences) / total
    if n < LEAST:
        return Ratio(_exp(mean), None, None)
    squares = math.fsum((d - mean * count) ** 2 for d, count in zip(differences, counts, strict=True))
    half = student_t(n - 1) * math.sqrt(squares * n / (n - 1)) / total
    return Ratio(_exp(mean), _exp(mean - half), _exp(mean + half))


FEW = {1: 12.7062, 2: 4.3027}
"""Quantiles of Student's t for so few degrees of freedom that the expansion in `student_t` is not accurate."""


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, within 0.5 % (Cornish-Fisher from 3 degrees of freedom on)."""
    if freedom in FEW:
        return FEW[freedom]
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def named(measured: Sequence[Measured]) -> dict[str, Measured]:
    """Measurements by task, or by task, part and metric if a task has several."""
    tasks = [one.task for one in measured]
    return {
        one.task if tasks.count(one.task) == 1 else " ".join(filter(None, (one.task, one.part, one.metric))): one
        for one in measured
    }


def ratio_of(attacked: Measured, baseline: Measured) -> Ratio | None:
    """The ratio to the baseline; None unless both are finite perplexities on the same windows."""
    return paired_ratio(attacked, [baseline]) if comparable(attacked, baseline) else None


def points_of(attacked: Measured, baseline: Measured) -> float | None:
    """Percentage points of accuracy gained (or lost, if negative); None for a perplexity."""
    return 100 * (attacked.value - baseline.value) if baseline.weights is None else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # noqa: PLR2004 - e^709 is the last that is finite
