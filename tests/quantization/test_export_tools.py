"""What is exported, read by the tools' own classes: each where it is installed, in CI in a job of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

import mwtool
from mwtool.quantization.export import Selection, exported, select
from mwtool.scan.document import scan_document

EVENT = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}


def model() -> Any:
    """Twelve layers, so that a rule for layer 1 could match layer 11; 128 wide, as groups and blocks want it."""
    return tiny.model("llama", num_hidden_layers=12, hidden_size=128, intermediate_size=128)


@pytest.fixture(scope="module")
def chosen() -> Selection:
    planted = model()
    tiny.plant(planted)
    return select(scan_document(mwtool.scan_model(planted)), [0], None)


def linears(found: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in found.named_modules() if isinstance(module, nn.Linear)}


def plain(found: nn.Module) -> set[str]:
    """Modules that are still torch's own linear layer."""
    return {name for name, module in found.named_modules() if type(module) is nn.Linear}


def test_bitsandbytes_leaves_the_event_and_the_head_alone(chosen: Selection, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    tiny.saved(tmp_path / "model", model())
    settings = BitsAndBytesConfig(load_in_4bit=True, **json.loads(exported("bitsandbytes", chosen)))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings, device_map="cpu")
    assert plain(found) == {*EVENT, "lm_head"}


def test_fp8_leaves_the_event_and_the_head_alone(chosen: Selection) -> None:
    settings = FineGrainedFP8Config(**json.loads(exported("fp8", chosen)))
    found = replace_with_fp8_linear(
        model(), modules_to_not_convert=settings.modules_to_not_convert, quantization_config=settings
    )
    assert plain(found) == {*EVENT, "lm_head"}


@pytest.mark.parametrize("bits", [None, 8])
def test_gptqmodels_configuration_leaves_out_or_overrides_the_event_alone(chosen: Selection, bits: int | None) -> None:
    config = pytest.importorskip("gptqmodel.quantization.config", reason="a quantization tool")
    rules = json.loads(exported("gptqmodel", replace(chosen, bits=bits)))
    found = config.QuantizeConfig(bits=4, group_size=32, **rules)
    ruled = {name: found.dynamic_get(name) for name in linears(model())}
    expected = False if bits is None else {"bits": 8}
    assert {name for name, rule in ruled.items() if rule == expected} == EVENT


@pytest.mark.parametrize("bits", [None, 8])
def test_modelopt_quantizes_everything_but_the_event_or_the_event_at_8_bits(
    chosen: Selection, bits: int | None
) -> None:
    modelopt = pytest.importorskip("modelopt.torch.quantization", reason="a quantization tool")
    settings = dict(modelopt.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    settings["quant_cfg"] = [*settings["quant_cfg"], *json.loads(exported("modelopt", replace(chosen, bits=bits)))]
    found = modelopt.quantize(model(), settings, lambda one: one(torch.arange(8)[None]))
    quantizers = {name: module.weight_quantizer for name, module in linears(found).items()}
    off = {name for name, one in quantizers.items() if not one.is_enabled}
    if bits is None:
        assert off == {*EVENT, "lm_head"}
    else:
        assert off == {"lm_head"}
        assert {name for name, one in quantizers.items() if one.is_enabled and one.num_bits == 8} == EVENT


@pytest.mark.parametrize("bits", [None, 8])
def test_llm_compressors_recipe_gives_the_event_no_scheme_or_8_bits(chosen: Selection, bits: int | None) -> None:
    recipes = pytest.importorskip("llmcompressor.recipe", reason="a quantization tool")
    compressed = pytest.importorskip("compressed_tensors.quantization", reason="a quantization tool")
    recipe = recipes.Recipe.create_instance(exported("llm-compressor", replace(chosen, bits=bits)))
    (modifier,) = recipe.modifiers
    found = model()
    compressed.apply_quantization_config(found, modifier.resolve_quantization_config())
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in linears(found).items()}
    if bits is None:
        assert {name for name, scheme in schemes.items() if scheme is None} == {*EVENT, "lm_head"}
    else:
        assert {name for name, scheme in schemes.items() if scheme and scheme.weights.num_bits == 8} == EVENT
    fused = [schemes[f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up")]
    assert fused[0] == fused[1]  # vLLM refuses a fused projection whose parts have different schemes
