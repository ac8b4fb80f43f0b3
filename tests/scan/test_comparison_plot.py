"""The figure of two scans: both curves of each massive dimension, neither hidden."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

import mwtool
from mwtool.errors import BadValue


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    model = tiny.model("llama")
    tiny.plant(model)
    scan = mwtool.scan_model(model).to_dict()
    return mwtool.compare_scans({**scan, "model": "a/base"}, {**scan, "model": "/home/me/tuned"}).to_dict()


def test_each_massive_dimension_has_a_curve_of_both_scans(document: dict[str, Any]) -> None:
    figure = mwtool.plot_comparison(document)
    traces = document["dimensions"]
    assert len(figure.axes) == len(traces) > 0
    for panel in figure.axes:
        trace = next(one for one in traces if panel.get_title(loc="left").endswith(f" {one['dimension']}"))
        for line, side in zip(panel.lines, "ab", strict=True):
            assert list(map(float, line.get_ydata())) == [abs(value) for value in trace[f"values_{side}"]]
        assert panel.lines[0].get_markersize() > panel.lines[1].get_markersize()  # equal curves are both seen
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A: a/base", "B: tuned"]


def test_models_of_different_shapes_have_nothing_to_draw(document: dict[str, Any]) -> None:
    (panel,) = mwtool.plot_comparison({**document, "same_shape": False}).axes
    assert [text.get_text() for text in panel.texts] == ["Nothing to draw: models of different shapes."]
    with pytest.raises(BadValue, match="was given; expected"):
        mwtool.plot_comparison({"schema": "mwtool.scan/2"})
