"""Rows of several layers attacked together, and the spelling of such attacks."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from mwtool.errors import BadValue
from mwtool.surgery.attack import Attack, Edit, edited, edited_together, parse_attack

IDS = torch.tensor([[1, 5, 6, 7, 9]])
ATTACKS = [Attack("zero", 2), Attack("retain", 2), Attack("scale", 2, -0.5), Attack("mean", 2)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def edits_of(model: Any, *places: tuple[int, tuple[int, ...]]) -> list[Edit]:
    found = []
    for layer, rows in places:
        ffn = tiny.layers_of(model)[layer].ffns[0]
        found.append(Edit(ffn, rows, torch.linspace(-1, 1, ffn.width(model), dtype=torch.float64)))
    return found


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gemma3_text", "falcon", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_a_joint_attack_equals_single_ones_inside_each_other(model_type: str, attack: Attack) -> None:
    model: Any = tiny.model(model_type, num_hidden_layers=4)
    before, plain = tiny.digest(model), logits(model)
    first, second = edits_of(model, (1, (1, 4)), (3, (0, 7)))
    with edited_together(model, [first, second], attack):
        together = logits(model)
    with edited(model, first.ffn, first.rows, attack, means=first.means):
        one = logits(model)
        with edited(model, second.ffn, second.rows, attack, means=second.means):
            nested = logits(model)
    assert torch.equal(together, nested)
    assert model_type in ("mixtral", "qwen2_moe") or not (torch.equal(together, one) or torch.equal(together, plain))
    assert tiny.digest(model) == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("mode", ["zero", "retain", "scale"])
def test_two_edits_of_one_network_are_one_of_all_their_rows(mode: Any) -> None:
    model: Any = tiny.model("llama", num_hidden_layers=2)
    attack = Attack(mode, 2, 0.5 if mode == "scale" else None)
    ffn = tiny.layers_of(model)[1].ffns[0]
    with edited_together(model, [Edit(ffn, (1, 4)), Edit(ffn, (4, 7))], attack):
        together = logits(model)
    with edited(model, ffn, (1, 4, 7), attack):
        assert torch.equal(logits(model), together)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_all_places_are_restored_however_the_block_ends(fault: type[BaseException]) -> None:
    model: Any = tiny.model("llama", torch.bfloat16, num_hidden_layers=4)
    before = tiny.digest(model)
    for attack in ATTACKS:
        with pytest.raises(fault), edited_together(model, edits_of(model, (0, (1, 4)), (2, (3,))), attack):
            raise fault
        assert tiny.digest(model) == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_changed_where_one_of_the_places_does_not_exist() -> None:
    model: Any = tiny.model("llama", num_hidden_layers=4)
    before = tiny.digest(model)
    with (
        pytest.raises(BadValue, match="row 640 does not exist"),
        edited_together(model, edits_of(model, (0, (1, 4)), (2, (640,))), Attack("zero", 2)),
    ):
        pass
    assert tiny.digest(model) == before


layers = st.lists(st.integers(0, 999), unique=True, max_size=5).map(tuple)
modes = st.sampled_from(["zero", "retain", "mean"])
factors = st.floats(allow_nan=False, allow_infinity=False, width=16).filter(lambda x: float(f"{x:g}") == x)


@given(modes, st.integers(0, 10**6), layers)
def test_an_attack_is_read_as_it_is_shown(mode: Any, k: int, places: tuple[int, ...]) -> None:
    attack = Attack(mode, k, layers=places)
    assert parse_attack(str(attack)) == attack


@given(factors, st.integers(0, 10**6), layers)
def test_a_scaling_is_read_as_it_is_shown(factor: float, k: int, places: tuple[int, ...]) -> None:
    attack = Attack("scale", k, factor, places)
    assert parse_attack(str(attack)) == attack


@given(st.text(alphabet="zeroscalnti:@+0123456789.- ", max_size=16))
def test_what_is_no_attack_is_refused_in_one_line(text: str) -> None:
    fault = None
    try:
        attack = parse_attack(text)
    except BadValue as refused:
        fault = str(refused)
    if fault is None:
        assert parse_attack(str(attack)) == attack
    else:
        assert "\n" not in fault
        assert repr(text) in fault


@pytest.mark.parametrize("text", ["zero:3@", "zero:3@2+", "zero:3@+2", "zero@2:3", "none@2", "zero:3@2+2", "zero:3@-1"])
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="attack"):
        parse_attack(text)
