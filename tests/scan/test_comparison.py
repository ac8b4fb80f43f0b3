"""Two scans side by side: planted changes are found under their names, and nothing else is."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from transformers import PreTrainedModel

import mwtool
from mwtool import Comparison, Scan, compare_scans, scan_model
from mwtool.errors import BadValue
from mwtool.report.page import page_of
from mwtool.scan.comparison.report import compare_report
from mwtool.scan.comparison.schema import CompareDocument

ROOT = Path(__file__).parent.parent.parent
DIM = 5


def planted(*writes: tuple[int, int, float, float], layers: int = tiny.LAYERS) -> PreTrainedModel:
    """(layer, row, value, z) in order of layers, all to one dimension."""
    model = tiny.quiet(tiny.model("llama", num_hidden_layers=layers))
    for layer, row, value, z in writes:
        tiny.write(model, layer, row, {DIM: value}, z=z)
    return model


WRITES = ((1, 11, 300.0, 90.0), (3, 13, 20000.0, 400.0))


@pytest.fixture(scope="module")
def base() -> Scan:
    return scan_model(planted(*WRITES))


def shown(found: Comparison, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(compare_report(found, console.width))
    return console.file.getvalue()  # type: ignore[attr-defined] # a StringIO


def fates(found: Comparison) -> dict[tuple[int, str], list[tuple[int, str]]]:
    return {(one.layer, one.found_in): [(row.row, row.fate) for row in one.rows] for one in found.events}


def test_a_scan_compared_with_itself_keeps_everything(base: Scan) -> None:
    found = compare_scans(base, base.to_dict())
    assert fates(found) == {(1, "both"): [(11, "kept")], (3, "both"): [(13, "kept")]}
    assert all((one.z_a, one.after_a, one.written_a) == (one.z_b, one.after_b, one.written_b) for one in found.events)
    assert {one.found_in for one in found.super_weights} <= {"both"}
    assert found.notes == ()
    assert "the same row carries it; the largest |z| of B is 1.00 times that of A" in found.said[0]
    assert found.said[1].startswith("All 2 events of A are events of B, where 2 of the 2 rows")


def test_values_are_those_of_the_two_scans(base: Scan) -> None:
    other = scan_model(planted(WRITES[0], (3, 13, 10000.0, 200.0)))
    found = compare_scans(base, other)
    event = found.events[1]
    assert (event.z_a, event.z_b) == (base.events[1].rows.magnitudes[0], other.events[1].rows.magnitudes[0])
    assert (event.after_a, event.after_b) == (base.events[1].after, other.events[1].after)
    assert event.z_b == pytest.approx(200, rel=1e-3)  # as planted, in float32
    assert event.after_b == pytest.approx(10300, rel=0.01)  # what the quiet weights add besides
    assert found.said[0].endswith("0.50 times that of A: what is done to these rows in A can be done in B.")
    (dimension,) = found.dimensions
    assert dimension.values_b == other.dimensions[0].values


def test_a_row_that_another_one_replaces_is_lost_and_the_other_new(base: Scan) -> None:
    found = compare_scans(base, scan_model(planted(WRITES[0], (3, 21, 20000.0, 400.0))))
    assert fates(found)[3, "both"] == [(13, "lost"), (21, "new")]
    lost, new = found.massive
    assert (lost.rank_a, new.rank_b) == (1, 1)
    assert lost.z_b is None or lost.z_b < 1
    assert "of the 1 rows that carry it in A, 0 carry it in B, not 13 but 21 besides" in found.said[0]


def test_rows_that_change_places_are_moved() -> None:
    def two(first: float, second: float) -> Scan:
        model = planted((3, 13, 9000.0, first))
        tiny.write(model, 3, 21, {DIM: 9000.0}, z=second)
        return scan_model(model)

    found = compare_scans(two(400.0, 300.0), two(300.0, 400.0))
    assert [(row.row, row.fate, row.rank_a, row.rank_b) for row in found.massive] == [
        (13, "moved", 1, 2),
        (21, "moved", 2, 1),
    ]
    assert "the same 2 rows carry it, in another order" in found.said[0]


def test_an_event_of_one_scan_alone_shows_what_the_dimension_is_in_the_other(base: Scan) -> None:
    other = scan_model(planted(WRITES[1]))
    found = compare_scans(base, other)
    event = found.events[0]
    assert (event.layer, event.found_in, event.z_b, event.kind_b) == (1, "a", None, None)
    assert event.after_b == other.dimensions[0].values[1]
    assert [row.fate for row in event.rows] == ["lost"]
    assert "1 of A's 2 events are events of B (lost: layer 1 of dimension 5)" in found.said[1]
    assert found.said[1].endswith("differ.")
    assert re.search(r"^ +1 +5 A only +\d", shown(found), re.MULTILINE)
    back = compare_scans(other, base)
    assert back.events[0].found_in == "b"
    assert "A's one event is an event of B (new: layer 1 of dimension 5)" in back.said[1]


def test_another_massive_layer_says_that_rows_do_not_serve(base: Scan) -> None:
    found = compare_scans(base, scan_model(planted(WRITES[0], (4, 13, 20000.0, 400.0))))
    assert found.massive == ()
    assert found.said[0] == ("The massive layer is 3 in A and 4 in B: rows of A do not serve B; scan B itself.")


def test_models_without_massive_layers_are_compared(base: Scan) -> None:
    nothing = scan_model(tiny.quiet(tiny.model("llama")))
    assert compare_scans(base, nothing).said[0].startswith("The massive layer of A is 3; B has none (no massive dim")
    assert compare_scans(nothing, base).said[0] == "A has no massive layer (no massive dimension); that of B is 3."
    neither = compare_scans(nothing, nothing)
    assert neither.said == ("Neither has a massive layer (no massive dimension; no massive dimension).",)
    assert "none massive" in shown(neither)


def test_of_models_of_different_shapes_only_summaries_are_compared(base: Scan) -> None:
    found = compare_scans(base, scan_model(planted(*WRITES, layers=6)))
    assert (found.same_shape, found.events, found.massive, found.dimensions, found.super_weights) == (False, *4 * ((),))
    (said,) = found.said
    assert said.startswith("The models differ in shape (layers 8 and 6), so that layers, dimensions and rows do not ")
    assert (found.a.layer, found.b.layer, found.b.count) == (3, 3, 1)


def test_what_differs_in_how_the_scans_were_made_is_noted(base: Scan) -> None:
    model = planted(*WRITES)
    limits = mwtool.Thresholds(magnitude=90.0)
    other = scan_model(model.to(torch.bfloat16), settings=mwtool.Settings(bos="2", thresholds=limits, last_layer=5))
    notes = " ".join(compare_scans(base, other).notes)
    for part in (
        "token 1 and B token 2",
        "float32 and B in bfloat16",
        "different thresholds",
        "B was scanned up to layer 5",
    ):
        assert part in notes


def test_rows_of_different_experts_are_different_rows(base: Scan) -> None:
    document = base.to_dict()
    document["shape"]["experts"] = 4
    other = json.loads(json.dumps(document))
    for one, expert in ((document, 0), (other, 2)):
        one["massive"]["expert"] = expert
    assert [(row.expert, row.fate) for row in compare_scans(document, other).massive] == [(0, "lost"), (2, "new")]


def test_the_document_fits_its_model_and_every_key_is_described(base: Scan) -> None:
    document = compare_scans(base, scan_model(planted(WRITES[1]))).to_dict()
    CompareDocument.model_validate(json.loads(json.dumps(document)))
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_0-9]+)`", page))
    assert keys(document) - described == set()
    assert "## `mwtool.compare/1`" in page


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_report_fits_the_terminal(base: Scan, width: int) -> None:
    text = shown(compare_scans(base, scan_model(planted(WRITES[0], (3, 21, 20000.0, 400.0)))), width)
    assert max(map(len, text.splitlines())) <= width
    assert "kept 11" in text


def test_the_page_shows_what_became_of_the_rows(base: Scan) -> None:
    found = compare_scans(base, scan_model(planted(WRITES[0], (3, 21, 20000.0, 400.0))))
    page = page_of([base.to_dict(), {**found.to_dict(), "model": base.to_dict()["model"]}])
    assert "Comparison with" in page
    assert "not 13 but 21 besides" in page


def test_what_is_no_scan_is_refused_by_its_place(base: Scan) -> None:
    with pytest.raises(BadValue, match=r"the second scan is no mwtool\.scan/2 document: parameters"):
        compare_scans(base, {key: value for key, value in base.to_dict().items() if key != "parameters"})
