"""A scan's document: its keys, and the way back from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import mwtool
from mwtool import MwtoolError, Scan, Settings
from mwtool.errors import BadValue
from mwtool.files.document import text_of
from mwtool.massive import Identity, MassiveWeights, load_events, load_massive
from mwtool.scan.document import scan_document
from mwtool.scan.published import ROWS, SUPER_WEIGHTS, published
from mwtool.scan.settings import ByHand

ENVELOPE = "schema mwtool_version model revision model_type dtype device seed versions command"
SCAN = "massive massive_event absence by_hand events check dimensions layers layers_walked partial"
SCAN += " super_weights weights bos sun"
EVENT = "layer dimension kind flip written before after lives others rows weights"
MASSIVE = "layer module expert indices magnitudes shares median count share_of_parameters"


@pytest.fixture(scope="module")
def scan() -> Scan:
    model = tiny.model("llama")
    tiny.plant(model)
    return mwtool.scan_model(model, settings=Settings(k=3))


@pytest.fixture(scope="module")
def document(scan: Scan) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text_of(scan_document(scan, "mwtool scan")))
    return parsed


def keys(value: dict[str, Any], expected: str) -> bool:
    return set(expected.split()) <= set(value)


def test_every_promised_key_is_there(document: dict[str, Any]) -> None:
    assert document["schema"] == "mwtool.scan/2"
    assert keys(document, f"{ENVELOPE} {SCAN}")
    assert keys(document["massive"], MASSIVE)
    assert all(keys(one, "layer hidden intermediate") for one in document["layers"])
    assert all(keys(one[part], "top median") for one in document["layers"] for part in ("hidden", "intermediate"))
    assert all(keys(one, "index value") for layer in document["layers"] for one in layer["hidden"]["top"])
    assert all(keys(one, EVENT) for one in document["events"])
    assert all(keys(one["rows"], MASSIVE) for one in document["events"])
    assert all(keys(one, "dimension values written") for one in document["dimensions"])
    assert all(keys(one, "layer hidden_dim ffn_index value") for one in document["super_weights"])
    assert all(keys(one, "parameter checkpoint_name dim indices") for one in document["weights"])
    assert keys(document["bos"], "id token how")
    assert document["events"]
    assert document["dimensions"]
    assert document["super_weights"]
    assert document["weights"]


def test_values_are_those_of_the_scan(scan: Scan, document: dict[str, Any]) -> None:
    assert scan.massive is not None
    assert document["massive"]["indices"] == list(scan.massive.indices)
    assert len(document["massive"]["indices"]) == 3
    assert (document["layers_walked"], document["partial"]) == (len(scan.states), False)
    assert document["events"][document["massive_event"]]["rows"] == document["massive"]
    for shown, event in zip(document["events"], scan.events, strict=True):
        assert (shown["layer"], shown["dimension"], shown["after"]) == (event.layer, event.dimension, event.after)
    for shown, trace in zip(document["dimensions"], scan.dimensions, strict=True):
        assert shown["values"] == [float(state.hidden[trace.dimension]) for state in scan.states]
    for shown, state in zip(document["layers"], scan.states, strict=True):
        first = shown["hidden"]["top"][0]
        assert abs(first["value"]) == float(state.hidden.abs().max())
        assert first["value"] == float(state.hidden[first["index"]])
    assert document["versions"]["python"].startswith("3.")
    assert document["mwtool_version"] == mwtool.__version__


def test_without_massive_weights_the_whole_object_is_null() -> None:
    document = scan_document(mwtool.scan_model(tiny.model("llama")))
    assert document["massive"] is None
    assert (document["events"], document["weights"], document["massive_event"]) == ([], [], None)
    assert document["absence"] == "no massive dimension"
    assert keys(document, f"{ENVELOPE} {SCAN}")


def test_a_number_that_is_not_finite_never_gets_into_a_document(scan: Scan) -> None:
    with pytest.raises(ValueError, match="finite number"):
        text_of(scan_document(replace(scan, sun=((3, 1, float("nan")),))))


def test_a_document_is_ascii_whatever_the_token(scan: Scan) -> None:
    """A terminal, or a pipe, need not know the tokenizer's characters."""
    text = text_of(scan_document(replace(scan, bos=replace(scan.bos, token="<｜begin▁of▁sentence｜>"))))  # noqa: RUF001 - DeepSeek's bos
    assert text.isascii()
    assert json.loads(text)["bos"]["token"] == "<｜begin▁of▁sentence｜>"  # noqa: RUF001 - likewise


def saved(folder: Path, document: dict[str, Any], **changes: Any) -> Path:
    path = folder / "scan.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_massive_weights_come_back_as_they_were(scan: Scan, document: dict[str, Any], tmp_path: Path) -> None:
    assert load_massive(saved(tmp_path, document), scan.identity).massive == scan.massive
    assert load_massive(saved(tmp_path, document, massive=None), scan.identity).massive is None


def test_keys_that_a_newer_version_adds_are_ignored(scan: Scan, document: dict[str, Any], tmp_path: Path) -> None:
    newer = {name: {**document[name], "new": 1} for name in ("massive", "shape")}
    assert load_massive(saved(tmp_path, document, **newer), scan.identity).massive == scan.massive


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model_type", "mistral"),
        ("layers", 9),
        ("hidden_size", 33),
        ("intermediate_size", 65),
        ("experts", 8),
    ],
)
def test_a_model_of_another_shape_is_refused(
    scan: Scan, document: dict[str, Any], tmp_path: Path, name: str, other: Any
) -> None:
    path = saved(tmp_path, document)
    with pytest.raises(BadValue, match=rf"scan.json was made with {name} .*; .* has {other}: scan it instead"):
        load_massive(path, replace(scan.identity, **{name: other}))


def test_another_model_of_the_same_shape_is_a_warning_naming_both(
    scan: Scan, document: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(tmp_path, document, model="org/base", revision="abc")
    found = load_massive(path, replace(scan.identity, model="org/tuned"))
    assert found.massive == scan.massive
    (warning,) = found.notes
    assert "org/base at abc" in warning
    assert "org/tuned" in warning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"schema": "mwtool.eval/1"},
            "schema 'mwtool.eval/1'; expected 'mwtool.scan/2' or",
        ),
        ({"schema": None}, "schema None"),
        ({"massive": {}}, "massive.layer: field required"),
        ({"massive": [1]}, "massive: input should be a valid dictionary"),
        ({"shape": None}, "shape: input should be a valid dictionary"),
    ],
)
def test_what_is_no_scan_document_is_refused(
    scan: Scan, document: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadValue, match=words):
        load_massive(saved(tmp_path, document, **changes), scan.identity)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 8}, "layer 8 of 8"),
        ({"layer": "one"}, "massive.layer: input should be a valid integer, found 'one'"),
        ({"layer": True}, "massive.layer: input should be a valid integer, found True"),
        ({"layer": 1.0}, "massive.layer: input should be a valid integer, found 1.0"),
        ({"shares": ["x", 0.1, 0.1]}, "massive.shares.0: input should be a valid number, found 'x'"),
        ({"value": 10**400}, "massive.value: input should be a "),
        ({"share_of_parameters": 1.5}, "less than or equal to 1, found 1.5"),
        ({"value": float("nan")}, "NaN is no number in JSON"),
        ({"value": float("-inf")}, "-Infinity is no number in JSON"),
        ({"module": "\ud800"}, "massive.module: input should be a valid string"),
        ({"layer": -1}, "massive.layer: .* greater than or equal to 0, found -1"),
        ({"dimension": 32}, "dimension 32 of 32"),
        ({"expert": 0}, "expert 0 of None"),
        ({"indices": []}, "massive.indices: list should have at least 1 item"),
        ({"indices": [1, 1, 2]}, "expected different row numbers"),
        ({"indices": [1, -2, 3]}, "massive.indices.1: .*, found -2"),
        ({"indices": "abc"}, "massive.indices: input should be a valid list"),
        ({"indices": [1, 2]}, "2 indices, 3 magnitudes and 3 shares"),
    ],
)
def test_rows_that_no_scan_would_have_written_are_refused(
    scan: Scan, document: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    massive = {**document["massive"], **changes}
    with pytest.raises(BadValue, match=words):
        load_massive(saved(tmp_path, document, massive=massive), scan.identity)


def test_a_file_that_is_not_there_is_named(scan: Scan, tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"nothing.json does not exist; expected .*scan -o"):
        load_massive(tmp_path / "nothing.json", scan.identity)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


READ = [("", key) for key in "schema model revision model_type shape massive".split()]
READ += [("massive", key) for key in [*MASSIVE.split(), "dimension", "value"]]
READ += [("shape", key) for key in "layers hidden_size intermediate_size experts".split()]


Load = Callable[[str, str, Any], MassiveWeights | None]


@pytest.fixture(scope="module")
def load_with(scan: Scan, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load the document after one of its values was replaced."""
    folder, text = tmp_path_factory.mktemp("drawn"), json.dumps(document)

    def load(part: str, key: str, value: Any) -> MassiveWeights | None:
        changed = json.loads(text)
        (changed[part] if part else changed)[key] = value
        return load_massive(saved(folder, changed), scan.identity).massive

    return load


@given(place=st.sampled_from(READ), value=JSON)
def test_any_value_in_any_place_is_read_or_refused(load_with: Load, place: tuple[str, str], value: Any) -> None:
    """What is accepted can be applied: rows, layer and dimension are numbers within the shape."""
    try:
        massive = load_with(*place, value)
    except MwtoolError:
        return
    if massive is not None:
        assert 0 <= massive.layer < 8
        assert 0 <= massive.dimension < 32
        assert all(isinstance(index, int) and index >= 0 for index in massive.indices)


def test_published_rows_are_those_of_the_same_repository_only() -> None:
    known = published("meta-llama/Llama-2-7b-hf")
    assert known is not None
    assert known.rows == ROWS["llama-2-7b-hf"]
    assert known.super_weights == ((1, 2533, 7890),)
    assert published("somewhere/else") is None
    alone = published("google/gemma-7b")
    assert alone is not None
    assert alone.rows is None
    a, b, *rest = known.rows.indices
    assert known.rows.agreement(known.rows.layer, known.rows.indices) == "match"
    assert known.rows.agreement(known.rows.layer, (a, b)) == "match"
    assert known.rows.agreement(known.rows.layer, (b, a, *rest)) == "same rows in another order"
    assert known.rows.agreement(known.rows.layer, (a, b, 0)) == "2 of 3 rows shared"
    assert known.rows.agreement(7, known.rows.indices) == "another layer: 7, published 1"


def test_published_super_weights_lie_in_the_layer_and_row_of_the_published_rows() -> None:
    """Two independent papers; where both have a model they agree on layer and first row."""
    both = set(ROWS) & set(SUPER_WEIGHTS)
    assert len(both) >= 4
    for name in both:
        for layer, _, index in SUPER_WEIGHTS[name]:
            assert (layer, index) == (ROWS[name].layer, ROWS[name].indices[0])


VERSION_1 = json.loads((Path(__file__).parents[1] / "support" / "scan-1.json").read_text())
"""What version 0.1.0 wrote for the bundled model."""


def test_a_document_of_schema_1_is_still_read(tmp_path: Path) -> None:
    massive = VERSION_1["massive"]
    identity = Identity(
        model="demo",
        revision=None,
        model_type="llama",
        layers=10,
        hidden_size=192,
        intermediate_size=512,
    )
    found = load_massive(saved(tmp_path, VERSION_1), identity)
    assert found.massive is not None
    assert (found.massive.layer, list(found.massive.indices)) == (massive["layer"], massive["indices"])
    assert (found.notes, found.events) == ((), ())
    with pytest.raises(BadValue, match=r"scan.json has no events; expected a scan of schema mwtool.scan/2"):
        load_events(saved(tmp_path, VERSION_1), identity)


def test_a_choice_by_hand_is_in_the_document_and_is_what_other_commands_read(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tiny.plant(model)
    found = mwtool.scan_model(model, settings=Settings(by_hand=ByHand(layer=1, indices=(3, 17))))
    document = json.loads(text_of(scan_document(found)))
    assert document["by_hand"] == {"event": None, "layer": 1, "expert": None, "indices": [3, 17]}
    massive = load_massive(saved(tmp_path, document), found.identity).massive
    assert massive is not None
    assert massive == found.massive
    assert massive.indices == (3, 17)


def test_identity_and_weights_cannot_be_changed_by_accident(scan: Scan) -> None:
    for frozen, name in ((scan.identity, "layers"), (scan.massive, "layer"), (scan, "massive")):
        assert isinstance(frozen, Identity | MassiveWeights | Scan)
        with pytest.raises(AttributeError):
            setattr(frozen, name, 3)
