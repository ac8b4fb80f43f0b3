"""Means and intervals over seeds, examples and draws are those of the formulas they are described by."""

from __future__ import annotations

import math
import statistics

import pytest
from scipy import stats

from mwtool.evaluation.measurement import Measured
from mwtool.reproduction.controls import control_cell
from mwtool.reproduction.page import page_cell
from mwtool.reproduction.statistics import cell_of, over_seeds


def perplexity(value: float, nll: tuple[float, ...] = ()) -> Measured:
    return Measured(
        task="ppl:x", metric="perplexity", value=value, stderr=0.5, n=4, seconds=0.0, samples=nll,
        weights=(1.0,) * len(nll),        higher_is_better=False, digest="d",
    )  # fmt: skip


def accuracy(samples: list[float], task: str) -> Measured:
    value = statistics.fmean(samples)
    error = statistics.stdev(samples) / math.sqrt(len(samples))
    return Measured(
        task=task, metric="acc", value=value, stderr=error, n=len(samples), seconds=0.0, samples=tuple(samples),
        digest=task,
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12])
def test_the_interval_over_seeds_is_students(n: int) -> None:
    values = [math.sin(one) for one in range(n)]
    low, high = stats.t.interval(0.95, n - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    span = over_seeds(values)
    assert (span.low, span.high) == (pytest.approx(low, rel=0.01), pytest.approx(high, rel=0.01))


def test_perplexities_over_seeds_are_averaged_and_compared_as_logarithms() -> None:
    found = {seed: (perplexity(value),) for seed, value in enumerate((20.0, 40.0, 50.0))}
    beside = {seed: (perplexity(value),) for seed, value in enumerate((10.0, 10.0, 20.0))}
    cell = cell_of(found, beside)
    assert cell is not None
    assert cell["value"] == pytest.approx(statistics.geometric_mean([20, 40, 50]))
    assert cell["change"]["value"] == pytest.approx(statistics.geometric_mean([2, 4, 2.5]))
    assert (cell["over"], cell["change"]["over"], cell["change"]["kind"]) == ("seeds", "seeds", "ratio")


def test_the_mean_over_tasks_weighs_each_alike_and_is_compared_on_the_same_questions() -> None:
    one = (accuracy([1, 1, 0, 1], "a"), accuracy([0, 1, 0, 1, 0, 1, 0, 1], "b"))
    other = (accuracy([1, 0, 0, 1], "a"), accuracy([0, 1, 0, 0, 0, 1, 0, 0], "b"))
    cell = cell_of({0: one}, {0: other})
    assert cell is not None
    assert cell["value"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    half = 1.96 * 100 * math.hypot(*(float(each.stderr or 0) for each in one)) / 2
    assert cell["interval"] == pytest.approx([cell["value"] - half, cell["value"] + half])
    assert cell["change"]["kind"] == "points"
    assert cell["change"]["value"] == pytest.approx((25 + 25) / 2)
    assert cell["change"]["interval"][0] < 25 < cell["change"]["interval"][1]


def test_a_model_without_seeds_stands_beside_every_seed() -> None:
    cell = cell_of({0: (perplexity(20.0),), 3: (perplexity(20.0),)}, {0: (perplexity(10.0),)})
    assert cell is not None
    assert (cell["seeds"], cell["change"]["value"]) == ([0, 3], pytest.approx(2.0))


def test_random_rows_are_a_mean_over_draws_beside_the_unchanged_model() -> None:
    runs = [
        {"mode": "zero", "k": 5, "control": f"random:{seed}", "results": {"a": value}}
        for seed, value in enumerate((11.0, 9.0))
    ]
    runs += [{"mode": "zero", "k": 5, "control": None, "results": {"a": 99.0}}]
    document = {"runs": runs, "baseline": {"a": 10.0}, "tasks": [{"name": "a", "higher_is_better": False}]}
    cell = control_cell(document, "zero:5", ["a"])
    assert cell is not None
    assert (cell["seeds"], cell["over"]) == ([0, 1], "draws")
    assert cell["value"] == pytest.approx(math.sqrt(99))
    assert cell["change"]["value"] == pytest.approx(math.sqrt(0.99))
    assert control_cell(document, "retain:5", ["a"]) is None


def test_points_on_the_page_have_two_decimals_and_ratios_near_one_have_four() -> None:
    cell = {"value": 50.03, "interval": None, "over": "seeds", "seeds": [0], "nonfinite": None}
    points = {"kind": "points", "value": -1.25, "interval": [-3.5, 1.0017], "over": "examples"}
    ratio = {"kind": "ratio", "value": 0.9978, "interval": [0.9912, 1.23], "over": "examples"}
    assert page_cell({**cell, "change": points}) == "50.0<br>-1.25 [-3.50, +1.00]"
    assert page_cell({**cell, "change": ratio}) == "50.0<br>x0.9978 [0.9912, 1.23]"
