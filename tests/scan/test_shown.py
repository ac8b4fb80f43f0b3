"""A scan in a notebook: one line, a table, a frame."""

from __future__ import annotations

import json

import pytest
import tiny

import mwtool
from mwtool.errors import BadValue
from mwtool.files.tabular import html_of
from mwtool.scan.document import scan_document


@pytest.fixture(scope="module")
def scan() -> mwtool.Scan:
    model = tiny.model("llama")
    tiny.plant(model)
    model.config.name_or_path = "<b>owner</b>/name"
    return mwtool.scan_model(model)


def test_its_repr_is_one_line_with_the_model_layer_and_rows(scan: mwtool.Scan) -> None:
    assert scan.massive is not None
    text = repr(scan)
    assert len(text.splitlines()) == 1
    assert len(text) < 200
    assert f"layer={scan.massive.layer}, rows={list(scan.massive.indices)}" in text


def test_the_dict_is_the_document_and_can_be_serialized(scan: mwtool.Scan) -> None:
    assert scan.to_dict() == scan_document(scan)
    assert json.loads(json.dumps(scan.to_dict())) == scan.to_dict()


def test_the_frame_has_a_line_for_each_layer(scan: mwtool.Scan) -> None:
    pytest.importorskip("pandas")
    frame = scan.to_frame()
    document = scan.to_dict()
    assert list(frame["layer"]) == [layer["layer"] for layer in document["layers"]]
    assert list(frame["hidden_value"]) == [layer["hidden"]["top"][0]["value"] for layer in document["layers"]]


def test_without_pandas_the_message_says_what_to_do(scan: mwtool.Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwtool.files.tabular.find_spec", lambda _: None)
    with pytest.raises(BadValue, match="pip install pandas"):
        scan.to_frame()


def test_html_escapes_what_comes_from_a_model(scan: mwtool.Scan) -> None:
    shown = scan._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;owner" in shown
    assert shown.count("<tr>") == 1 + len(scan.events)
    assert "<script>" not in html_of("<script>", [{"<script>": "<script>"}])
