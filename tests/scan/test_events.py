"""Events planted in tiny models: erased and rewritten, in steps, in two dimensions, in an expert, behind a norm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from mwtool import Scan, Settings, scan_checkpoint, scan_model
from mwtool.errors import BadValue
from mwtool.scan import capture
from mwtool.scan.settings import ByHand, Thresholds
from mwtool.scan.story import build_up, listed, ranges, story

DIM, OTHER = 5, 9


def planted(*writes: tuple[int, dict[int, float], float], model_type: str = "llama") -> PreTrainedModel:
    """(layer, values, z) in order of layers; each by a row of its own, 10 + layer."""
    model = tiny.quiet(tiny.model(model_type))
    for layer, values, z in writes:
        tiny.write(model, layer, 10 + layer, values, z=z)
    return model


@pytest.fixture(scope="module")
def erased() -> PreTrainedModel:
    """Written, erased, written far larger, and taken down by the largest |z| of all."""
    return planted(
        (1, {DIM: 300.0}, 90.0), (2, {DIM: -280.0}, 900.0), (4, {DIM: 20000.0}, 400.0), (6, {DIM: -15000.0}, 2000.0)
    )


def course(scan: Scan) -> list[tuple[int, int, str, int | None]]:
    return [(event.layer, event.dimension, event.kind, event.lives) for event in scan.events]


def test_a_value_that_is_erased_and_written_again_gives_the_later_layer(erased: PreTrainedModel) -> None:
    """As in SmolLM2: the first plateau is not the answer, nor is the largest |z|, which erases."""
    found = scan_model(erased)
    assert course(found) == [(1, DIM, "up", 1), (2, DIM, "down", None), (4, DIM, "up", 2), (6, DIM, "down", None)]
    assert found.massive is not None
    assert (found.massive.layer, found.massive.indices[0], found.massive.count) == (4, 14, 1)
    assert found.massive == found.events[2].rows
    assert max(event.rows.magnitudes[0] for event in found.events) > found.massive.magnitudes[0]
    assert (
        story(found, DIM) == f"Dimension {DIM} is written at layer 1, erased at 2, written again at 4 and removed at 6."
    )


def test_a_partial_walk_sees_the_first_plateau_only_and_says_so(erased: PreTrainedModel) -> None:
    found = scan_model(erased, settings=Settings(last_layer=3))
    assert found.massive is not None
    assert (found.partial, found.massive.layer) == (True, 1)
    assert course(found) == [(1, DIM, "up", 1), (2, DIM, "down", None)]


@pytest.mark.parametrize("kept", [4, 0], ids=["rows kept", "layer read again"])
def test_rows_and_shares_of_every_event_are_those_of_a_plain_recomputation(
    erased: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """From disk, where the layers are gone by the time the dimension is known; down events included."""
    monkeypatch.setattr(capture, "KEPT", kept)
    found = scan_checkpoint(str(tiny.saved(tmp_path, erased)), Settings(k=4))
    assert len(found.events) == 4
    for event in found.events:
        z = found.states[event.layer].intermediate
        pieces = erased.model.layers[event.layer].mlp.down_proj.weight[event.dimension].detach().double() * z
        order = z.abs().argsort(descending=True, stable=True)[:4].tolist()
        assert list(event.rows.indices) == order
        assert event.rows.shares == pytest.approx([float(pieces[i] / pieces.sum()) for i in order], rel=1e-12)
        assert event.rows.magnitudes == tuple(abs(float(z[i])) for i in order)
        assert event.rows.indices[0] == 10 + event.layer
        assert event.written == pytest.approx(float(pieces.sum()), rel=1e-4)  # float32 against float64
        assert event.after == float(found.states[event.layer].hidden[event.dimension])
        assert event.before == event.after - event.written
    assert [places[0].indices[0] for places in found.event_protect] == [11, 12, 14, 16]


def test_a_dimension_that_grows_in_steps_is_called_a_build_up() -> None:
    model = planted(*[(layer, {DIM: 900.0}, 50.0 + layer) for layer in range(1, 6)])
    found = scan_model(model)
    assert [event.layer for event in found.events] == [1, 2, 3, 4, 5]
    assert all(event.kind == "up" for event in found.events)
    said = build_up(found, DIM)
    assert said is not None
    assert said.startswith("Layers 1 to 5 write 20% to 20% of dimension 5's largest value (4,")
    assert story(found, DIM) == f"Dimension {DIM} is built up at layers 1 to 5."


def test_one_row_that_writes_two_dimensions_is_one_event_with_another_beside_it() -> None:
    found = scan_model(planted((2, {DIM: 500.0, OTHER: -900.0}, 300.0), (5, {OTHER: 850.0}, 100.0)))
    first, second = found.events
    assert (first.dimension, [one.dimension for one in first.others]) == (OTHER, [DIM])
    assert (second.dimension, second.kind, second.others) == (OTHER, "down", ())
    assert [one.dimension for one in found.dimensions] == [DIM, OTHER]
    for trace in found.dimensions:
        assert list(trace.values) == [float(state.hidden[trace.dimension]) for state in found.states]
        assert list(trace.written) == [float(state.added[trace.dimension]) for state in found.states]
    assert story(found, OTHER) == f"Dimension {OTHER} is written at layer 2 and removed at 5."


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_in_a_mixture_the_rows_are_those_of_the_expert_that_wrote_it(tmp_path: Path, model_type: str) -> None:
    model = tiny.quiet(tiny.model(model_type))
    tiny.write(model, 1, 7, {DIM: 800.0})
    ffn = tiny.write(model, 3, 3, {DIM: 9000.0}, z=2000.0)
    found, streamed = scan_model(model), scan_checkpoint(str(tiny.saved(tmp_path, model)))
    assert [event.layer for event in found.events][:2] == [1, 3]
    event = found.events[1]
    assert (event.rows.expert, event.rows.indices[0], event.rows.count) == (ffn.expert, 3, 1)
    assert found.massive == event.rows
    assert streamed.massive is not None
    assert (streamed.massive.expert, streamed.massive.indices[0]) == (ffn.expert, 3)
    assert found.router is not None
    assert found.router.layer == 3


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_what_is_written_is_what_a_norm_behind_the_ffn_lets_pass(model_type: str) -> None:
    """A row whose W_down output is 1 adds thousands to the stream, and it is these that count."""
    model = tiny.model(model_type)
    tiny.plant(model, layer=2, dim=DIM)
    found = scan_model(model)
    event = next(event for event in found.events if event.layer == 2)
    assert (event.dimension, event.kind) == (DIM, "up")
    assert abs(event.written) > 2 * abs(float(found.states[2].parts[0].output[DIM]))
    silenced = model.get_submodule(tiny.layers_of(model)[2].adds).register_forward_hook(lambda _m, _a, out: out * 0)
    without = float(scan_model(model).states[2].hidden[DIM])
    silenced.remove()
    assert event.before == pytest.approx(without, abs=1e-4 * abs(event.after))


def test_massive_dimensions_of_the_embedding_alone_give_no_massive_layer() -> None:
    model = tiny.quiet(tiny.model("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.BOS, DIM] = 5000.0
    found = scan_model(model)
    assert (found.massive, found.absence) == (None, "not written by an FFN")
    assert [one.dimension for one in found.dimensions] == [DIM]


def test_a_value_written_in_the_last_layer_alone_gives_no_massive_layer() -> None:
    model = planted((tiny.LAYERS - 1, {DIM: 3000.0}, 400.0))
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.BOS, DIM] = 500.0  # massive before, by the embedding
    found = scan_model(model)
    assert (found.massive, found.absence) == (None, "written only in the last layer")
    assert [event.layer for event in found.events] == [tiny.LAYERS - 1]


def test_lower_thresholds_find_more_and_higher_ones_less(erased: PreTrainedModel) -> None:
    few = scan_model(erased, settings=Settings(thresholds=Thresholds(magnitude=10000)))
    assert [event.layer for event in few.events] == [4, 6]
    none = scan_model(erased, settings=Settings(thresholds=Thresholds(magnitude=1e6)))
    assert (none.events, none.absence) == ((), "no massive dimension")


def by_hand(**chosen: object) -> Settings:
    return Settings(k=3, by_hand=replace(ByHand(), **chosen))  # type: ignore[arg-type] # names and types as in ByHand


def test_an_event_a_layer_or_rows_named_by_hand_take_the_place_of_the_massive_ones(erased: PreTrainedModel) -> None:
    plain = scan_model(erased, settings=Settings(k=3))
    assert plain.massive is not None
    event = scan_model(erased, settings=by_hand(event=3))
    assert event.massive == plain.events[3].rows
    assert event.massive_event == 3
    assert event.predicted == plain.events[2]
    layer = scan_model(erased, settings=by_hand(layer=1))
    assert layer.massive == plain.events[0].rows
    quiet = scan_model(erased, settings=by_hand(layer=3)).massive
    assert quiet is not None
    assert (quiet.layer, quiet.dimension) == (3, DIM)  # no event: of the massive dimensions the one written most to
    z = plain.states[3].intermediate.abs()
    assert quiet.indices == tuple(z.argsort(descending=True, stable=True)[:3].tolist())
    rows = scan_model(erased, settings=by_hand(indices=(2, 14))).massive
    assert rows is not None
    assert (rows.layer, rows.indices, rows.magnitudes[1]) == (4, (2, 14), plain.massive.magnitudes[0])
    assert rows.shares[1] == plain.massive.shares[0]
    assert event.events == plain.events
    assert [place.indices for place in scan_model(erased, settings=by_hand(indices=(2, 14))).protect] == [(2, 14)] * 3


def test_an_expert_is_named_among_those_bos_is_routed_to() -> None:
    model = planted((3, {DIM: 9000.0}, 400.0), model_type="mixtral")
    parts = scan_model(model).states[3].parts
    routed = [part.ffn.expert for part in parts]
    other = routed[1]
    found = scan_model(model, settings=by_hand(layer=3, expert=other)).massive
    assert found is not None
    assert (found.expert, found.indices[0]) == (other, int(parts[1].intermediate.abs().argmax()))
    absent = next(number for number in range(99) if number not in routed)
    with pytest.raises(BadValue, match=rf"not routed to expert {absent} of layer 3 but to \["):
        scan_model(model, settings=by_hand(layer=3, expert=absent))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"event": 4}, "there is no event 4; the scan found 4 events, 0 to 3"),
        ({"layer": 8}, "layer 8 does not exist; the model has layers 0 to 7"),
        ({"event": 1, "layer": 1}, "both an event and a layer"),
        ({"indices": (64,)}, "row 64 does not exist; .* in layer 4 has rows 0 to 63"),
        ({"indices": (3, 3)}, "row 3 is named twice"),
        ({"layer": 1, "expert": 0}, "layer 1 has one dense feed-forward network; there is no expert 0"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(
    erased: PreTrainedModel, chosen: dict[str, object], words: str
) -> None:
    with pytest.raises(BadValue, match=words):
        scan_model(erased, settings=by_hand(**chosen))


def test_a_layer_behind_the_end_of_a_partial_walk_is_refused(erased: PreTrainedModel) -> None:
    with pytest.raises(BadValue, match="layer 5 is behind the end of the walk, layer 3; raise --layers"):
        scan_model(erased, settings=replace(by_hand(layer=5), last_layer=3))
    with pytest.raises(BadValue, match="--layers ends at layer 8, which does not exist; the model has layers 0 to 7"):
        scan_model(erased, settings=Settings(last_layer=8))


def test_without_events_only_a_layer_can_be_chosen() -> None:
    model = tiny.quiet(tiny.model("llama"))
    with pytest.raises(BadValue, match="there is no event 0; the scan found no events"):
        scan_model(model, settings=by_hand(event=0))
    with pytest.raises(BadValue, match="no massive layer to take rows of"):
        scan_model(model, settings=by_hand(indices=(1,)))
    found = scan_model(model, settings=by_hand(layer=2))
    assert found.massive is not None
    assert found.massive.layer == 2
    assert found.massive.dimension == int(found.states[2].added.abs().argmax())


@pytest.mark.parametrize(
    ("numbers", "words", "short"),
    [
        ([4], "4", "4"),
        ([1, 2], "1 and 2", "1-2"),
        ([1, 2, 3, 5], "1 to 3 and 5", "1-3, 5"),
        ([1, 3, 5], "1, 3 and 5", "1, 3, 5"),
    ],
)
def test_runs_of_layers_are_named_by_their_ends(numbers: list[int], words: str, short: str) -> None:
    assert listed(numbers) == words
    assert ranges(numbers) == short
