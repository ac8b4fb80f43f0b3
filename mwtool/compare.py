"""Two figures of the same examples: their ratio or difference, with a paired interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mwtool.measured import Measured
from mwtool.verdict import LEAST, comparable, paired_ratio, student_t


@dataclass(frozen=True, slots=True)
class Paired:
    """What one figure is beside another.

    kind: `ratio` of perplexities, `points` between accuracies (hundredths), or `difference` of other means.
    low, high: a 95 % interval over the examples both have; None where there are too few.
    """

    kind: Literal["ratio", "points", "difference"]
    value: float
    low: float | None
    high: float | None
    n: int


def paired(one: Measured, other: Measured) -> Paired | None:
    """`one` beside `other`; None unless both are finite and have the same examples, asked in the same way."""
    if one.digest is None or one.digest != other.digest or one.metric != other.metric or one.part != other.part:
        return None
    if one.nonfinite or other.nonfinite or not one.samples or len(one.samples) != len(other.samples):
        return None
    if one.weights is not None:
        if not comparable(one, other):
            return None
        ratio = paired_ratio(one, [other])
        return Paired("ratio", ratio.value, ratio.low, ratio.high, one.n)
    return _difference(one, other)


def _difference(one: Measured, other: Measured) -> Paired:
    """The mean of the samples' differences d_i, -+ t SE, with SE^2 = var(d) / n."""
    counted = all(value in (0, 1) for value in (*one.samples, *other.samples))
    scale = 100 if counted else 1
    differences = [scale * (a - b) for a, b in zip(one.samples, other.samples, strict=True)]
    mean, n = math.fsum(differences) / len(differences), len(differences)
    kind: Literal["points", "difference"] = "points" if counted else "difference"
    if n < LEAST:
        return Paired(kind, mean, None, None, n)
    half = student_t(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Paired(kind, mean, mean - half, mean + half, n)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one model under one attack."""

    model: str
    attack: str
    measured: Measured

    @property
    def key(self) -> tuple[str, str | None, str]:
        """Equal for the same metric of the same task."""
        return self.measured.task, self.measured.part, self.measured.metric


def beside_first(rows: Sequence[Row]) -> Iterator[tuple[Row, Row, Paired | None]]:
    """Every figure but the first of its kind, with that first one and what it is beside it."""
    first: dict[tuple[str, str | None, str], Row] = {}
    for row in rows:
        reference = first.setdefault(row.key, row)
        if reference is not row:
            yield row, reference, paired(row.measured, reference.measured)
