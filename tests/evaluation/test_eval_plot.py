"""The figure of evaluations: every bar has the value and interval of its result, whatever is compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from evaluations import accuracy, compared, evaluated, evaluation, perplexity
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from mwtool.errors import BadValue
from mwtool.evaluation.comparison import student_t
from mwtool.evaluation.plot import plot_evaluation

RIGHT = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
WRONG = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def bars(panel: Axes) -> dict[str, list[tuple[float, float]]]:
    """By series, where each bar begins and ends."""
    found = {}
    for one in panel.containers:
        assert isinstance(one, BarContainer)
        found[str(one.get_label())] = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in one.patches]
    return found


def titles(figure: Figure) -> list[str]:
    return [panel.get_title(loc="left") for panel in figure.axes]


def caption(figure: Figure) -> str:
    return " ".join(figure._supxlabel.get_text().split("\n"))  # type: ignore[attr-defined] # no getter


def test_values_and_paired_changes_under_attack_are_drawn_with_their_intervals() -> None:
    losses, attacked = [20.0, 21.0, 22.0, 23.0], [27.0, 28.0, 28.0, 30.0]
    figure = plot_evaluation(
        evaluation(
            "owner/name", none=[perplexity(losses), accuracy(RIGHT)], zero=[perplexity(attacked), accuracy(WRONG)]
        )
    )
    assert titles(figure) == ["Perplexity", "Accuracy", "Perplexity under attack", "Accuracy under attack"]
    values, shares, ratio, points = map(bars, figure.axes)
    before, after = math.exp(86 / 40), math.exp(113 / 40)
    assert values == {"no attack": [(0, pytest.approx(before))], "zero:1": [(0, pytest.approx(after))]}
    assert shares == {"no attack": [(0, pytest.approx(200 / 3))], "zero:1": [(0, pytest.approx(100 / 3))]}
    assert ratio == {"zero:1": [(1, pytest.approx(after / before))]}
    assert points == {"zero:1": [(0, pytest.approx(-100 / 3))]}
    half = student_t(5) * 100 * math.sqrt(sum((x - 2 / 3) ** 2 for x in RIGHT) / 5) / math.sqrt(6)
    interval = figure.axes[1].lines[1].get_xdata()
    assert list(map(float, interval)) == pytest.approx([200 / 3 - half, 100])  # an accuracy is 100 % at most
    assert "owner/name (float32)" in caption(figure)
    assert "ppl:x: 4 windows of 10 tokens; mc:x: 6 examples" in caption(figure)


def test_models_stand_on_one_axis_and_beside_the_first() -> None:
    figure = plot_evaluation(compared(evaluated("a/first", none=RIGHT), evaluated("/home/me/second", none=WRONG)))
    assert titles(figure) == ["Accuracy", "Accuracy beside a/first"]
    assert list(bars(figure.axes[0])) == ["a/first", "second"]
    assert list(bars(figure.axes[1])) == ["second"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/first", "second"]


def test_each_model_under_attack_is_compared_with_itself() -> None:
    figure = plot_evaluation(
        compared(evaluated("a", none=RIGHT, zero=WRONG), evaluated("b", none=[1.0] * 6, zero=[0.0] * 6))
    )
    change = bars(figure.axes[1])
    assert change["a, zero:1"] == [(0, pytest.approx(-100 / 3))]
    assert change["b, zero:1"] == [(0, -100)]
    assert change["b, no attack"] == [(0, pytest.approx(100 / 3))]  # beside a
    assert titles(figure) == ["Accuracy", "Accuracy, change"]
    assert "else beside a." in caption(figure)


def test_models_that_share_no_examples_are_not_compared() -> None:
    one, other = (
        evaluation("a", none=[perplexity([20.0] * 4)]),
        evaluation("b", none=[perplexity([21.0] * 4, digest="y")]),
    )
    assert titles(plot_evaluation(compared(one, other))) == ["Perplexity"]


def test_what_is_not_finite_has_a_label_and_no_bar_and_far_apart_perplexities_a_log_axis() -> None:
    bad: dict[str, Any] = {**perplexity([20.0] * 4), "value": None, "nonfinite": "4 of 4 samples are not finite"}
    figure = plot_evaluation(
        evaluation("a", none=[perplexity([20.0] * 4)], zero=[perplexity([90.0] * 4)], retain=[bad])
    )
    values = bars(figure.axes[0])
    assert figure.axes[0].get_xscale() == "log"
    assert values["retain:1"] == [(1, 1)]
    assert values["zero:1"] == [(1, pytest.approx(math.exp(9)))]
    assert "not finite" in [text.get_text() for text in figure.axes[0].texts]


def test_of_many_subtasks_the_wholes_are_drawn_and_the_rest_counted() -> None:
    parts = [accuracy(RIGHT, task="mmlu", part=f"part {at}") for at in range(40)]
    figure = plot_evaluation(evaluation("a", none=[*parts, accuracy(RIGHT, task="mmlu")]))
    (drawn,) = bars(figure.axes[0]).values()
    assert len(drawn) == 24
    assert "mmlu" in [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "17 more metrics are in the document" in caption(figure)


def test_series_differ_in_grey() -> None:
    figure = plot_evaluation(evaluated("a", none=RIGHT, zero=WRONG, retain=RIGHT))
    hatches = [one.patches[0].get_hatch() for one in figure.axes[0].containers]  # type: ignore[attr-defined] # bars
    assert len(set(hatches)) == 3


def scored(kind: str, samples: list[float], metric: str, part: str | None = None) -> dict[str, Any]:
    """An entry of `results` with answers that a judge, or LongBench's metrics, scored."""
    one = accuracy(samples, task=f"{kind}:x", metric=metric, part=part)
    return {**one, "setting": {kind: "by"}, "answers": ["said"] * len(samples)}


def test_scored_answers_are_drawn_on_their_own_scale_with_intervals_inside_it() -> None:
    judged, less = scored("judge", [5, 5, 5, 4], "score"), scored("judge", [1, 1, 2, 1], "score")
    figure = plot_evaluation(evaluation("a", none=[judged], zero=[less]))
    assert titles(figure) == ["Judge's score", "Judge's score under attack"]
    values, change = figure.axes
    assert bars(values) == {"no attack": [(1, 4.75)], "zero:1": [(1, 1.25)]}  # from the worst grade
    assert bars(change) == {"zero:1": [(0, -3.5)]}
    assert values.get_xlabel() == "Judge's score, 1 to 5"
    ends = [end for line in values.lines[1::2] for end in np.asarray(line.get_xdata()).tolist()]
    assert (min(ends), max(ends)) == (1, 5)
    assert "judge:x: 4 answers" in caption(figure)


def test_metrics_of_long_contexts_share_an_axis_also_where_every_score_is_0_or_1() -> None:
    both = [scored("longbench", [0.5, 1, 0.4, 0.3], "qa_f1", "qasper"), scored("longbench", [0] * 4, "count", "count")]
    broken = [scored("longbench", [0] * 4, "qa_f1", "qasper"), scored("longbench", [1] * 4, "count", "count")]
    figure = plot_evaluation(evaluation("a", none=both, zero=broken))
    assert titles(figure) == ["LongBench score", "LongBench score under attack"]
    values, change = map(bars, figure.axes)
    assert values == {"no attack": [(0, pytest.approx(0.55)), (0, 0)], "zero:1": [(0, 0), (0, 1)]}
    assert change == {"zero:1": [(0, pytest.approx(-0.55)), (0, 1)]}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "longbench:x qasper qa_f1",
        "longbench:x count count",
    ]


def test_answers_alone_have_an_empty_figure_and_other_documents_none() -> None:
    answered = {**accuracy([0.0], task="generate:x", metric="characters"), "answers": ["Paris"]}
    assert len(plot_evaluation(evaluation("a", none=[answered])).axes[0].texts) == 1
    with pytest.raises(BadValue, match=r"expected 'mwtool.eval/1' or"):
        plot_evaluation({"schema": "mwtool.scan/2"})
