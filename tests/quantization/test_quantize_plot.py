"""The figure of a quantization check: a bar is what a set of protected weights gives back."""

from __future__ import annotations

from typing import Any

import pytest
from evaluations import accuracy, perplexity
from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from mwtool.errors import BadValue
from mwtool.quantization.document import SCHEMA
from mwtool.quantization.plot import plot_quantization
from mwtool.report.page import page_of

NAMES = ("1 column of down_proj, layer 3", "1 random column of down_proj, layer 3")


def variant(bits: int, name: str | None, results: list[dict[str, Any]], shares: list[Any]) -> dict[str, Any]:
    return {
        "bits": bits, "protected": name, "kind": name, "k": 1, "control": name == NAMES[1], "kept_weights": 8,
        "kept_bytes": 13, "results": results, "ratios": [{"value": 1.5, "low": 1.4, "high": 1.6}, None],
        "shares_given_back": shares,
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    results = [perplexity([20.0] * 4), accuracy([1.0, 0.0, 1.0, 1.0])]
    share = [{"value": 0.25, "low": 0.2, "high": 0.3}, None]
    variants = [
        variant(bits, name, results, [None, None] if name is None else share)
        for bits in (4, 3)
        for name in (None, *NAMES)
    ]
    return {
        "schema": SCHEMA, "mwtool_version": "0", "model": "owner/name", "revision": None, "model_type": "llama",
        "dtype": "float32", "device": "cpu", "seed": 0, "versions": {}, "command": "mwtool quantize-check",
        "adapter": None, "on": None,
        "method": "round to nearest", "group": None, "levels": "minimum", "quantized_weights": 100,
        "baseline": results, "variants": variants, "verdicts": ["4 bits: it pays"], "notes": [],
    }  # fmt: skip


def bars(panel: Axes) -> dict[str, list[float]]:
    found = {}
    for one in panel.containers:
        assert isinstance(one, BarContainer)
        found[str(one.get_label())] = [bar.get_width() for bar in one.patches]
    return found


def test_a_series_is_a_number_of_bits_and_says_what_quantizing_costs(document: dict[str, Any]) -> None:
    shares = plot_quantization(document).axes[0]
    assert bars(shares) == {f"{bits} bits: 7.39 to 7.39, x1.50": [25, 25] for bits in (4, 3)}
    names = [label.get_text().replace("\n", " ") for label in shares.get_yticklabels()]
    assert names == [NAMES[0], f"{NAMES[1]} (control)"]
    assert list(map(float, shares.lines[1].get_xdata())) == [20, 30]


def test_accuracies_are_drawn_as_they_are_and_nothing_protected_among_them(document: dict[str, Any]) -> None:
    results = plot_quantization(document).axes[1]
    assert bars(results) == {f"{bits} bits: 75.0 to 75.0": [75, 75, 75] for bits in (4, 3)}
    assert results.get_yticklabels()[0].get_text() == "nothing"


def test_where_quantizing_costs_nothing_the_perplexities_are_drawn(document: dict[str, Any]) -> None:
    for one in document["variants"]:
        one["shares_given_back"] = [None, None]
    panel = plot_quantization(document).axes[0]
    assert panel.get_xlabel() == "perplexity"
    assert all(widths == pytest.approx([7.389, 7.389, 7.389], abs=1e-3) for widths in bars(panel).values())


def test_the_page_has_the_verdict_and_a_table_a_task(document: dict[str, Any]) -> None:
    page = page_of([document])
    assert "<p>4 bits: it pays.</p>" in page
    assert page.count("<caption>") == 2
    assert "20% to 30%" in page
    assert "<dd>a row</dd>" in page
    assert "<dd>levels from each group&#39;s minimum</dd>" in page


def test_another_document_is_refused() -> None:
    with pytest.raises(BadValue, match=r"expected 'mwtool.quantize-check/1'"):
        plot_quantization({"schema": "mwtool.scan/2"})
