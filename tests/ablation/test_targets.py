"""Which rows an ablation takes, and which beside them as controls."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from sweeps import swept
from words import LAYERS, opened, planted, with_tokenizer

import mwtool
from mwtool.ablation.controls import norm_rows, random_rows
from mwtool.ablation.sweep import Sweep
from mwtool.errors import BadValue
from mwtool.models.load import Loaded, load
from mwtool.scan.document import scan_document
from mwtool.scan.settings import Choice
from mwtool.scan.targets import Target, find_targets
from mwtool.surgery.attack import Attack


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return planted(tmp_path_factory.mktemp("planted"))


def test_controls_are_as_many_rows_and_random_ones_are_never_ranked_ones(loaded: Loaded) -> None:
    found = swept(loaded, Sweep(ks=(1, 3), draws=4))
    for k in (1, 3):
        beside = [run for run in found.runs if run.control and run.attack == Attack("zero", k)]
        assert [run.control for run in beside] == [*(f"random:{seed}" for seed in range(4)), "norm"]
        assert {len(run.rows[0]) for run in beside} == {k}
        assert len({run.rows[0] for run in beside}) == 5
        drawn = {row for run in beside if run.control != "norm" for row in run.rows[0]}
        assert not drawn & set(found.runs[0].targets[0].indices)


def test_random_rows_are_never_massive_ones_however_the_rows_were_chosen(loaded: Loaded) -> None:
    """Row 17 is the one that is truly massive in layer 1; no draw of all the others but those named may hold it."""
    for choice, k in ((Choice(), 1), (Choice(indices=(4, 5)), 2), (Choice(layers=(1,)), 1)):
        ((target,),), _ = find_targets(loaded, choice, k)
        others = 64 - len({*target.indices, 17})
        assert 17 not in (random_rows(target, 64, others, 0) or (17,))
        assert random_rows(target, 64, others + 1, 0) is None


def test_truly_massive_rows_that_a_saved_scan_does_not_rank_are_said(loaded: Loaded, tmp_path: Path) -> None:
    document = scan_document(mwtool.scan_model(loaded.base))
    document["massive"]["count"] = 7
    (tmp_path / "scan.json").write_text(json.dumps(document))
    _, notes = find_targets(loaded, Choice(file=tmp_path / "scan.json"), 1)
    assert "7 rows are truly massive and 5 are ranked: random controls may be among the others" in notes


def test_random_rows_are_nested_and_depend_on_the_seed_alone(loaded: Loaded) -> None:
    target = Target(layer=1, ffn=loaded.layers[1].ffns[0], indices=(17, 3))
    draws = [random_rows(target, 64, 5, seed) for seed in range(20)]
    assert draws == [random_rows(target, 64, 5, seed) for seed in range(20)]
    assert len(set(draws)) == 20
    assert random_rows(target, 64, 3, 7) == (draws[7] or ())[:3]
    assert set(random_rows(target, 64, 62, 0) or ()) == set(range(64)) - {17, 3}
    assert random_rows(target, 64, 63, 0) is None


def test_rows_of_largest_norm_are_those_of_up_and_gate_together(loaded: Loaded) -> None:
    mlp: Any = loaded.base.get_submodule("model.layers.3.mlp")
    norms = (mlp.up_proj.weight.double() ** 2 + mlp.gate_proj.weight.double() ** 2).sum(1)
    assert (
        list(norm_rows(loaded, Target(layer=3, ffn=loaded.layers[3].ffns[0], indices=()), 4) or ())
        == norms.topk(4).indices.tolist()
    )


def test_each_layer_has_a_line_with_its_own_top_rows(loaded: Loaded) -> None:
    targets, _ = find_targets(loaded, Choice(each_layer=True), 2)
    assert [target.layer for (target,) in targets] == list(range(LAYERS))
    state = mwtool.scan_model(loaded.base).states[3]
    assert targets[3][0].indices == tuple(state.intermediate.abs().topk(2).indices.tolist())
    found = swept(loaded, Sweep((Attack("zero"),), (2,), draws=0), Choice(each_layer=True))
    assert [run.targets[0].layer for run in found.runs] == list(range(LAYERS))


def test_a_layer_an_expert_and_rows_can_be_chosen(tmp_path: Path) -> None:
    loaded = planted(tmp_path, "mixtral", num_hidden_layers=4)
    ((target,),), _ = find_targets(loaded, Choice(layers=(2,), expert=3, indices=(5, 2)), 2)
    assert (target.layer, target.ffn.expert, target.indices) == (2, 3, (5, 2))
    ((top,),), _ = find_targets(loaded, Choice(layers=(2,)), 3)
    assert top.ffn.expert is not None
    assert len(top.indices) == 3
    unreached = next(e for e in range(4) if _refused(loaded, Choice(layers=(2,), expert=e)))
    with pytest.raises(BadValue, match=f"bos is not routed to expert {unreached} of layer 2 but to"):
        find_targets(loaded, Choice(layers=(2,), expert=unreached), 3)


def _refused(loaded: Loaded, choice: Choice) -> bool:
    try:
        find_targets(loaded, choice, 3)
    except BadValue:
        return True
    return False


@pytest.mark.parametrize(
    ("choice", "k", "message"),
    [
        (Choice(layers=(4,)), 1, "layer 4 does not exist; the model has layers 0 to 3"),
        (Choice(layers=(1,), expert=2), 1, r"layer 1 has one dense .*; there is no expert 2"),
        (
            Choice(layers=(1,), indices=(64,)),
            1,
            "row 64 does not exist; model.layers.1.mlp in layer 1 has rows 0 to 63",
        ),
        (Choice(indices=(64,)), 1, "row 64 does not exist"),
        (Choice(indices=(1, 2)), 3, "k is 3 and --indices names 2 rows"),
        (Choice(layers=(1,)), 65, "k is 65"),
        (Choice(), 65, "k is 65"),
    ],
)
def test_places_that_do_not_exist_are_refused_by_name(loaded: Loaded, choice: Choice, k: int, message: str) -> None:
    with pytest.raises(BadValue, match=message):
        find_targets(loaded, choice, k)


def test_a_model_without_massive_weights_is_told_what_to_name(tmp_path: Path) -> None:
    plain = opened(with_tokenizer(tmp_path, tiny.model("llama", num_hidden_layers=4)))
    for parameter in plain.base.parameters():
        parameter.data.mul_(0.1)
    with pytest.raises(BadValue, match=r"no massive weights; name rows yourself with --layer N --indices I,J"):
        find_targets(plain, Choice(), 1)


def test_rows_that_are_offloaded_are_attacked_as_those_in_memory(tmp_path: Path) -> None:
    here = planted(tmp_path)
    places = {name: "cpu" for name, _ in here.base.named_modules() if re.fullmatch(r"model\.\w+|lm_head", name)}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(LAYERS)}
    del places["model.layers"]
    options = {"device_map": places, "offload_folder": str(tmp_path / "off")}
    loaded = replace(load(str(tmp_path), model_options=options), tokenizer=here.tokenizer)
    sweep = Sweep((Attack("zero"),), (1,), draws=1)
    found, expected = (swept(one, sweep, Choice(layers=(2,))) for one in (loaded, here))
    assert [run.measured[0].value for run in found.runs] == [run.measured[0].value for run in expected.runs]
    away, near = (swept(one, Sweep((Attack("zero"), Attack("retain")), (1,), draws=1)) for one in (loaded, here))
    values = {(run.attack, run.control): run.measured[0].value for run in near.runs}
    assert len(away.runs) == 4
    assert all(values[run.attack, run.control] == run.measured[0].value for run in away.runs)
    assert all(run.measured[0].value != away.baseline[0].value for run in away.runs if run.control is None)
    # a value is fixed on its way, wherever the rows are
    fixed, plain = (swept(one, Sweep((Attack("mean"),), (1,), draws=1)) for one in (loaded, here))
    assert fixed.runs[0].measured[0].value == plain.runs[0].measured[0].value
    assert [run.control for run in fixed.runs] == [None, "random:0"]  # norms cannot be read


def test_layers_and_events_are_attacked_together(loaded: Loaded) -> None:
    ((one, two),), _ = find_targets(loaded, Choice(layers=(1, 3)), 2)
    assert (one.layer, two.layer, one.indices[0]) == (1, 3, 17)
    scan = mwtool.scan_model(loaded.base)
    for events in ("all", "up", (0,)):
        (group,), _ = find_targets(loaded, Choice(events=events), 1)  # type: ignore[arg-type] # one of the three forms
        kept = [event for event in scan.events if events != "up" or event.kind == "up"]
        assert [target.layer for target in group] == [event.layer for event in kept]
        assert [target.indices[0] for target in group] == [event.rows.indices[0] for event in kept]
    found = swept(loaded, Sweep((Attack("zero"),), (2,), draws=2), Choice(layers=(1, 3)))
    assert [run.control for run in found.runs] == [None, "random:0", "random:1", "norm"]
    assert {run.place for run in found.runs} == {"1+3"}
    assert all(len(rows) == 2 for run in found.runs for rows in run.rows)
    assert found.runs[1].rows[0] != found.runs[1].rows[1]  # drawn for each layer
    assert "in each of layers 1 and 3" in found.verdicts[0].text


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"events": (7,)}, "there is no event 7; the scan of .* has event 0"),
        ({"events": "down"}, "--event down: the scan of .* has no such event"),
        ({"layers": (1, 4)}, "layer 4 does not exist"),
    ],
)
def test_places_that_do_not_exist_are_refused(loaded: Loaded, choice: Any, fault: str) -> None:
    with pytest.raises(BadValue, match=fault):
        find_targets(loaded, Choice(**choice), 1)


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"events": (0,), "layers": (1,)}, "--event and --layer are given; expected one of them"),
        ({"layers": (1, 2), "indices": (3,)}, "--indices and --expert name rows of one layer"),
        ({"events": "all", "expert": 1}, "--indices and --expert name rows of one layer"),
        ({"each_layer": True, "indices": (3,)}, "--each-layer finds its own rows"),
        ({"file": Path("scan.json"), "layers": (1,)}, "--massive FILE names its layers; leave out --layer"),
        ({"expert": 1}, "--expert goes with --layer, --event or --indices"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(choice: Any, fault: str) -> None:
    with pytest.raises(BadValue, match=fault):
        Choice(**choice)
