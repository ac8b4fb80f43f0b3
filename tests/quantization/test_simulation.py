"""A model computes as if its weights had been replaced by quantized ones, and has its own when the block ends."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.errors import UnsupportedModel
from mwtool.quantization.protection import columns_of_down, entries_of_down, matrices_of, rows_of_inputs
from mwtool.quantization.rounding import Scheme, round_to_nearest
from mwtool.quantization.simulation import linear_weights, quantized

TYPES = ["llama", "phi3", "gpt2", "mixtral", "gpt_oss", "qwen2_moe", "opt", "gemma2"]
IDS = torch.tensor([[1, 5, 9, 3]])


def opened(model_type: str) -> tuple[nn.Module, list[FFN], list]:
    model = tiny.model(model_type).eval()
    layers = decoder_layers(adapter_for(model_type), model.config)
    return model, [ffn for layer in layers for ffn in layer.ffns], layers


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_of_a_model_with_rounded_weights(model_type: str) -> None:
    model, ffns, layers = opened(model_type)
    scheme, masks = Scheme(4, 8), columns_of_down(model, {ffns[0]: (0, 3)})
    weights = linear_weights(model, layers)
    written = copy.deepcopy(model)
    for one in weights:
        for name, places in one.parameters.items():
            for place in places:
                mask = masks.get(place.param)
                view = place.read(written)
                kept = None if mask is None else mask[place.index].T if place.transposed else mask[place.index]
                view.copy_(round_to_nearest(view, scheme, kept))
            assert name in dict(written.get_submodule(one.path).named_parameters(recurse=False))
    plain = logits(model)
    with quantized(model, weights, scheme, masks):
        inside = logits(model)
    assert torch.equal(inside, logits(written))
    assert not torch.equal(inside, plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("model_type", TYPES)
def test_attention_and_ffn_are_quantized_and_embeddings_and_head_are_not(model_type: str) -> None:
    model, _, layers = opened(model_type)
    weights = linear_weights(model, layers)
    names = {f"{one.path}.{name}" for one in weights for name in one.parameters}
    inside = tuple(f"{layer.path}." for layer in layers)
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name.startswith(inside) and "router" not in name and not name.endswith("_bias")
    }
    gates = {name for name in matrices if name.endswith("mlp.gate.weight")}  # routers that are no nn.Linear
    assert names - gates == matrices - gates


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_storage_that_comes_back_is_the_same_however_the_block_ends(model_type: str) -> None:
    model, _, layers = opened(model_type)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    calls = 0

    def fail(_module: nn.Module, _args: object) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    model.get_submodule(layers[1].path).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), quantized(model, linear_weights(model, layers), Scheme(3), {}):
        logits(model)
    assert calls == 1
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_masks_hold_what_their_names_say() -> None:
    for model_type in TYPES:
        model, ffns, _ = opened(model_type)
        ffn = ffns[0]
        columns = columns_of_down(model, {ffn: (1,)})
        rows = rows_of_inputs(model, {ffn: (1, 2)})
        (hidden, width) = ffn.down.read(model).shape
        assert sum(int(mask.sum()) for mask in columns.values()) == hidden
        assert sum(int(mask.sum()) for mask in rows.values()) == 2 * hidden * len(ffn.inputs)
        whole = matrices_of(model, [ffn])
        assert sum(int(mask.sum()) for mask in whole.values()) == hidden * width * (1 + len(ffn.inputs))
        one = entries_of_down(model, {ffn: [(2, 1)]})[ffn.down.param]
        view = one[ffn.down.index].T if ffn.down.transposed else one[ffn.down.index]
        assert view.nonzero().tolist() == [[2, 1]]


def test_a_matrix_that_is_kept_whole_computes_as_it_is() -> None:
    model, ffns, layers = opened("llama")
    everything = {
        f"{one.path}.{name}": torch.ones_like(model.get_parameter(f"{one.path}.{name}"), dtype=torch.bool)
        for one in linear_weights(model, layers)
        for name in one.parameters
    }
    plain = logits(model)
    with quantized(model, linear_weights(model, layers), Scheme(2), everything):
        assert torch.equal(logits(model), plain)
    assert ffns


def test_weights_that_are_offloaded_or_packed_are_refused() -> None:
    model, _, layers = opened("llama")
    with pytest.raises(UnsupportedModel, match="is offloaded"):
        linear_weights(copy.deepcopy(model).to("meta"), layers)
    packed = copy.deepcopy(model)
    linear = packed.get_submodule(layers[0].path).mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="is quantized already"):
        linear_weights(packed, layers)
