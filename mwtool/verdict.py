"""Attack against baseline and against its controls, on the same windows: ratios, their intervals, and words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mwtool.measured import Measured
from mwtool.surgery import Attack

LEVEL = 0.95
LEAST = 4
"""Windows below which no interval is given: the quantile's expansion is not good enough."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Attacked over baseline perplexity, and its 95 % interval over windows; None where there are too few."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{fine(self.low)}, {fine(self.high)}]"
        return f"{fine(self.value)}{interval}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One attack beside its controls, on one perplexity task.

    ratio: over the baseline. random: of each seed. norm: of the rows of largest norm, of which `norm_shared` are
    the attacked ones themselves. None or empty: not run.
    beyond: attacked over the random rows' geometric mean, paired by windows.
    """

    attack: Attack
    task: str
    layer: int
    expert: int | None
    ratio: Ratio
    random: tuple[float, ...]
    norm: float | None
    norm_shared: int | None
    beyond: Ratio | None
    text: str


def comparable(one: Measured, other: Measured) -> bool:
    """Whether both are finite perplexities of the same windows."""
    return (
        one.weights is not None
        and not one.nonfinite
        and not other.nonfinite
        and (one.digest, one.weights) == (other.digest, other.weights)
    )


def paired_ratio(attacked: Measured, baseline: Sequence[Measured]) -> Ratio:
    """Perplexity over that of `baseline` (of several: their geometric mean), with a paired interval.

    With d_i the difference of a window's -ln p, n_i its tokens: D = sum d / sum n, its variance that of a ratio of
    sums, the interval exp(D -+ t SE) with t of n - 1 degrees of freedom.
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


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by Cornish-Fisher; from 3 degrees of freedom on within 0.5 %."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def named(measured: Sequence[Measured]) -> dict[str, Measured]:
    """By task, and by task, part and metric where a task has several figures."""
    tasks = [one.task for one in measured]
    return {
        one.task if tasks.count(one.task) == 1 else " ".join(filter(None, (one.task, one.part, one.metric))): one
        for one in measured
    }


def ratio_of(attacked: Measured, baseline: Measured) -> Ratio | None:
    """For a perplexity that is finite, on both sides."""
    return paired_ratio(attacked, [baseline]) if comparable(attacked, baseline) else None


def points_of(attacked: Measured, baseline: Measured) -> float | None:
    """Points of an accuracy won or lost; None for a perplexity."""
    return 100 * (attacked.value - baseline.value) if baseline.weights is None else None


def figure(value: float) -> str:
    """A perplexity or a ratio as it is shown."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"  # noqa: PLR2004 - decimals of large numbers tell nothing


def fine(value: float) -> str:
    """With more decimals near 1, where two would hide on which side of it a ratio is."""
    return f"{value:.4f}" if 0 < abs(value - 1) < 0.01 else figure(value)  # noqa: PLR2004 - as described


def short(task: str) -> str:
    """A task's name without the folders of its file."""
    kind, colon, target = task.partition(":")
    return f"{kind}{colon}{Path(target).name}" if colon else task


def judge(
    attack: Attack,
    attacked: Measured,
    baseline: Measured,
    *,
    random: Sequence[Measured],
    norm: Measured | None,
    shared: int,
    layer: int,
    expert: int | None,
) -> Verdict | None:
    """The verdict in words; None where it is no perplexity or not finite."""
    if not comparable(attacked, baseline):
        return None
    drawn = [one for one in random if comparable(one, baseline)]
    ratio, each = paired_ratio(attacked, [baseline]), tuple(paired_ratio(one, [baseline]).value for one in drawn)
    largest = paired_ratio(norm, [baseline]).value if norm is not None and comparable(norm, baseline) else None
    beyond = paired_ratio(attacked, drawn) if drawn else None
    said = [f"{_doing(attack)} multiplies {short(attacked.task)} by {ratio}"]
    if each:
        said.append(f"{_rows(attack.k, 'random row')} by {figure(statistics.fmean(each))}{_spread(each)}")
    if largest is not None:
        said.append(f"{_largest(attack.k)}{_same(shared, attack.k)} by {figure(largest)}")
    text = "; ".join(said) + (f". {_conclusion(attack, beyond)}" if beyond is not None else ".")
    return Verdict(
        attack, attacked.task, layer, expert, ratio, each, largest, None if largest is None else shared, beyond, text
    )


def _conclusion(attack: Attack, beyond: Ratio) -> str:
    if beyond.low is None or beyond.high is None:
        return "Too few windows to tell them apart."
    them = "Retaining these rows" if attack.mode == "retain" else "These rows"
    if beyond.low <= 1 <= beyond.high:
        verb = "does" if attack.mode == "retain" else "do"
        return f"{them} {verb} no more and no less than random ones: x{beyond}."
    if attack.mode == "retain":
        return f"{them} leaves {'less' if beyond.value > 1 else 'more'} than retaining random ones: x{beyond}."
    return f"{them} matter {'more' if beyond.value > 1 else 'less'} than random ones: x{beyond}."


def _doing(attack: Attack) -> str:
    rows = _rows(attack.k, "row")
    return {
        "zero": f"zeroing {rows}",
        "retain": f"retaining only {rows}",
        "scale": f"scaling {rows} by {attack.factor:g}" if attack.factor is not None else "",
        "mean": f"fixing {rows} at their mean",
        "none": "nothing",
    }[attack.mode]


def _rows(k: int, name: str) -> str:
    return f"{k} {name}" if k == 1 else f"{k} {name}s"


def _largest(k: int) -> str:
    return "the row of largest norm" if k == 1 else f"the {k} rows of largest norm"


def _same(shared: int, k: int) -> str:
    """Rows of largest norm may be the attacked ones, which makes them no control."""
    if not shared:
        return ""
    if shared == k:
        return ", the same," if k == 1 else ", the same rows,"
    return f", {shared} of them the same,"


def _spread(values: Sequence[float]) -> str:
    return f" ({len(values)} draws, {figure(min(values))} to {figure(max(values))})" if len(values) > 1 else ""


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # noqa: PLR2004 - e^709 is the last that is finite
