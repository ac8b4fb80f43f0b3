"""Whatever else is done to the model around a step: it is right, or refused, and the pre-trained rows survive."""

from __future__ import annotations

import logging
from typing import Any

import peft.tuners.lora.dora
import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from training import ROWS, digest, frozen, gradients, loss_of, massive, small, with_adapter

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.macdrop.engine import MacDrop


def engine(model: nn.Module, base: Any = None, curriculum: str = "constant:0.5") -> MacDrop:
    return MacDrop(model, massive(base or model), curriculum, steps=10)


def up(base: Any) -> Tensor:
    return tiny.layers_of(base)[1].ffns[0].up.read(base)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merging_inside_a_step_is_refused_and_the_rows_survive(way: str, dora: bool) -> None:  # noqa: FBT001 - a parameter
    base = small()
    model = with_adapter(base, dora=dora, target_modules=["up_proj", "gate_proj"], layers_to_transform=[1])
    before, plain = digest(model), up(base).clone()
    with pytest.raises(BadValue, match=r"_proj\.weight are dropped during this"), engine(model, base).step(1):
        getattr(model, way)()
    assert digest(model) == before
    model.merge_adapter()  # afterwards it may be
    assert not torch.equal(up(base), plain)


def test_a_merged_adapter_is_refused_and_what_is_merged_survives() -> None:
    base = small()
    model = with_adapter(base)
    macdrop, before = engine(model, base), up(base).clone()
    model.merge_adapter()
    merged = digest(model)
    with pytest.raises(BadValue, match=r"merged into model\.layers\.1\.mlp\.up_proj\.weight"), macdrop.step(1):
        raise AssertionError("no step was begun")
    assert digest(model) == merged
    model.unmerge_adapter()
    torch.testing.assert_close(up(base), before, rtol=1e-5, atol=1e-6)  # the sum and difference round


def test_a_new_engine_first_restores_what_a_failed_step_left(caplog: pytest.LogCaptureFixture) -> None:
    """Else it would take the masked rows for the pre-trained ones."""
    model = frozen()
    before = digest(model)
    engine(model).begin(1)
    assert digest(model) != before
    with caplog.at_level(logging.WARNING, "mwtool"), engine(model).step(2):
        assert digest(model) != before
    assert digest(model) == before
    assert "that a failed step had left dropped" in caplog.text


def test_two_engines_on_the_same_rows_are_refused_and_on_different_rows_are_not() -> None:
    model = frozen()
    before = digest(model)
    first, second, elsewhere = engine(model), engine(model), MacDrop(model, massive(model, 2), "constant:1", steps=3)
    with first.step(1), elsewhere.step(1):
        inside = digest(model)
        with pytest.raises(BadValue, match="another MacDrop is already dropping"), second.step(1):
            raise AssertionError("no step was begun")
        assert digest(model) == inside
    assert digest(model) == before


def test_two_experts_in_one_parameter_have_an_engine_each() -> None:
    model = frozen("mixtral")
    before = digest(model)
    one, other = (MacDrop(model, massive(model, 1, expert), "constant:1", steps=3) for expert in (0, 2))
    with one.step(1), other.step(1):
        saved = model.state_dict()
    assert digest(model) == before
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())


def test_evaluation_mode_inside_a_step_sees_the_dropped_rows_and_none_after_it() -> None:
    base = small()
    model = with_adapter(base)
    with torch.no_grad():
        plain = loss_of(model.eval())
        with engine(model, base, "constant:1").step(1):
            assert not torch.equal(loss_of(model.eval()), plain)
            assert not up(base)[list(ROWS)].any()
        assert torch.equal(loss_of(model.eval()), plain)


def test_with_the_adapter_disabled_inside_a_step_the_base_is_seen_as_it_is() -> None:
    base = small()
    model = with_adapter(base)
    with engine(model, base, "constant:1").step(1), model.disable_adapter():
        assert not up(base)[list(ROWS)].any()
        assert torch.equal(loss_of(model), loss_of(frozen()))


def test_norms_that_dora_caches_are_never_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small()
    model = with_adapter(base, dora=True)
    with torch.no_grad():
        model.train()
        with engine(model, base).step(1):
            expected = loss_of(model)
        plain = loss_of(model)
        monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
        model.eval()
        assert torch.equal(loss_of(model), plain)
        with engine(model, base).step(1):
            assert torch.equal(loss_of(model), expected)
        assert torch.equal(loss_of(model), plain)


# torch warns of its own tracing of PEFT's DoRA
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_a_compiled_model_sees_every_mask_and_the_rows_put_back(dora: bool) -> None:  # noqa: FBT001 - a parameter
    """Also a row dropped whole, after graphs that never met one."""
    models = []
    for compiled in (True, False):
        base = small()
        model: Any = with_adapter(base, dora=dora, trained=False)
        if compiled and dora:
            base.model.layers[1].mlp.compile(backend="eager")  # tracing all of DoRA takes long
        elif compiled:
            model = torch.compile(model, backend="eager")
        models.append((model, MacDrop(model, massive(base), "linear:0.5-1", steps=9)))
    (model, macdrop), (plain, other) = models
    before = loss_of(model)
    for t in (1, 9):
        with macdrop.step(t), other.step(t):
            found = loss_of(model)
            torch.testing.assert_close(found, loss_of(plain))
            assert not torch.equal(found, before)
    assert torch.equal(loss_of(model), before)


def test_a_model_cast_after_the_engine_was_made_is_dropped_from_as_it_is_now() -> None:
    model = frozen()
    macdrop = engine(model)
    model.to(torch.bfloat16)
    before = digest(model)
    with macdrop.step(1):
        rows = up(model)[list(ROWS)]
        assert torch.equal(rows != 0, macdrop.mask(1)[0])
    assert digest(model) == before
    assert macdrop.kept_bytes == 2 * 5 * model.config.hidden_size * 2


def test_a_model_cast_inside_a_step_has_its_own_rows_after_it() -> None:
    model = frozen()
    expected = digest(frozen().to(torch.bfloat16))
    with engine(model).step(1):
        model.to(torch.bfloat16)
    assert digest(model) == expected


@pytest.mark.parametrize("curriculum", ["constant:1", "constant:0.5"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt2"])
def test_dora_with_dropout_reads_the_dropped_weight_and_gives_no_nan(
    model_type: str,
    trained: bool,  # noqa: FBT001 - a parameter
    curriculum: str,
) -> None:
    """PEFT then computes the base result from the weight itself: equal to a weight with zeros written into it."""
    conv = {"fan_in_fan_out": model_type == "gpt2"}

    def run(*, by_hand: bool) -> tuple[Tensor, dict[str, Tensor]]:
        base = small(model_type)
        model = with_adapter(base, dora=True, trained=trained, lora_dropout=0.3, **conv)
        macdrop = engine(model, base, curriculum)
        torch.manual_seed(11)
        if not by_hand:
            with macdrop.step(1):
                found = gradients(model)
            torch.manual_seed(11)
            with macdrop.step(1):
                return loss_of(model).detach(), found
        for place in tiny.layers_of(base)[1].ffns[0].inputs:
            place.read(base)[list(ROWS)] *= macdrop.mask(1)[0]
        found = gradients(model)
        torch.manual_seed(11)
        return loss_of(model).detach(), found

    loss, found = run(by_hand=False)
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in found.values())
    expected_loss, expected = run(by_hand=True)
    if curriculum != "constant:1":
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    elif not trained:
        assert expected_loss.isnan()  # the guard is what makes the difference


@pytest.mark.parametrize("adapters", ["up_proj", "q_proj"])
def test_wrapped_and_unwrapped_matrices_are_dropped_alike(adapters: str) -> None:
    base, plain = small(), frozen()
    model = with_adapter(base, target_modules=[adapters], trained=False)  # B is zero: it adds nothing
    with engine(model, base).step(1), engine(plain).step(1):
        torch.testing.assert_close(loss_of(model), loss_of(plain))
        assert torch.equal(up(base), up(plain))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_that_peft_trains_by_parameter_are_dropped_at_weight_level(model_type: str) -> None:
    base = small(model_type)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = with_adapter(base, target_modules=["q_proj"], target_parameters=targets)
    before = digest(model)
    by_hand = with_adapter(small(model_type), target_modules=["q_proj"], target_parameters=targets)
    rows = massive(base, 1, 2)
    macdrop = MacDrop(model, rows, "constant:0.7", steps=3)
    for place in tiny.layers_of(by_hand.get_base_model())[1].ffns[2].inputs:
        place.read(by_hand.get_base_model())[list(ROWS)] *= macdrop.mask(1)[0]
    with macdrop.step(1):
        found = gradients(model)
        saved = model.state_dict()
        with pytest.raises(BadValue, match="dropped during this training step"):
            base.model.layers[1].mlp.experts.merge()
    expected = gradients(by_hand)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("experts" in name and value.any() for name, value in found.items())
    assert digest(model) == before
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("way", ["mixed", "transformers"])
def test_other_ways_to_add_adapters_are_dropped_from_alike(way: str) -> None:
    base, plain = small(), frozen()
    before = digest(plain)
    options = LoraConfig(r=4, target_modules=["up_proj"])
    model: Any = get_peft_model(base, options, mixed=True) if way == "mixed" else base
    if way == "transformers":
        base.add_adapter(options)
    with engine(model, base).step(1), engine(plain).step(1):
        torch.testing.assert_close(loss_of(model), loss_of(plain))
        assert torch.equal(up(base), up(plain))
    assert digest(plain) == before
    assert torch.equal(up(base), up(plain))


@pytest.mark.parametrize("config", [IA3Config, LoHaConfig, OFTConfig, VeraConfig], ids=lambda kind: kind.__name__)
def test_every_kind_of_adapter_finds_the_rows_as_they_were(config: Any) -> None:
    base = small()
    targets: dict[str, Any] = {"target_modules": ["up_proj"]}
    extra = {IA3Config: {"feedforward_modules": []}, OFTConfig: {"r": 0, "oft_block_size": 4}}.get(config, {})
    model = get_peft_model(base, config(**targets, **extra))
    before, plain = digest(model), loss_of(model)
    with engine(model, base, "constant:1").step(1):
        loss_of(model).backward()
        assert not torch.equal(loss_of(model), plain)
    assert digest(model) == before
    assert torch.equal(loss_of(model), plain)


def test_a_backward_after_its_step_is_an_error_of_torch_not_a_wrong_gradient() -> None:
    base = small()
    model = with_adapter(base)
    with engine(model, base).step(1):
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_saved_whole_is_refused_as_trained() -> None:
    base = small()
    model = with_adapter(base, target_modules=["q_proj"], modules_to_save=["mlp"])
    with pytest.raises(BadValue, match="is trainable"):
        engine(model, base)


class Foreign(nn.Linear):
    """A layer of a quantization library that has no `weight`."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        del self.weight


def test_a_layer_that_has_no_weight_is_refused_by_its_type() -> None:
    model = frozen()
    rows = massive(model)
    model.model.layers[1].mlp.up_proj = Foreign()
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is packed in a Foreign"):
        MacDrop(model, rows, "step:0.8", steps=3)


class Packed(nn.Parameter):
    """A weight of another library: its type is a floating one, its entries are not where they seem."""


def test_packed_weights_of_other_libraries_are_refused_whatever_their_type() -> None:
    model = frozen()
    rows, layer = massive(model), model.model.layers[1].mlp.up_proj
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight holds packed torch.float32 weights \(Packed\)"):
        MacDrop(model, rows, "step:0.8", steps=3)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(2, 3).to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"holds packed torch.int8 weights"):
        MacDrop(model, rows, "step:0.8", steps=3)


def test_zero_3_is_refused_by_name_where_experts_have_no_shape_either() -> None:
    model = frozen("mixtral")
    rows = massive(model, 1, 2)
    weight = model.model.layers[1].mlp.experts.gate_up_proj
    weight.data = torch.empty(0)
    weight.ds_id = 1
    with pytest.raises(UnsupportedModel, match="ZeRO-3"):
        MacDrop(model, rows, "step:0.8", steps=3)


def test_t_outside_the_run_is_refused_and_nothing_is_dropped() -> None:
    model = frozen()
    before, macdrop = digest(model), engine(model)
    for t in (0, 11):
        with pytest.raises(BadValue, match="outside the run"), macdrop.step(t):
            raise AssertionError("no step was begun")
    assert digest(model) == before
    assert macdrop.history == {}
