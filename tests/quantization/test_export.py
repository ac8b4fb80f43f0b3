"""What is exported names the FFN matrices of the chosen events and nothing else: layer 1 does not catch layer 11."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

import pytest
import tiny
import torch
import yaml
from transformers.quantizers.quantizers_utils import should_convert_module

import mwtool
from mwtool.errors import BadValue
from mwtool.quantization.export import TOOLS, WITH_BITS, Selection, exported, select
from mwtool.scan.document import scan_document


def document(model_type: str = "llama") -> dict[str, Any]:
    model = tiny.model(model_type, num_hidden_layers=12)
    tiny.plant(model)
    return scan_document(mwtool.scan_model(model))


@pytest.fixture(scope="module")
def chosen() -> Selection:
    return select(document(), [0], None)


@pytest.fixture(scope="module")
def modules() -> list[str]:
    model = tiny.model("llama", num_hidden_layers=12)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


EVENT = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_an_event_is_its_layers_ffn_matrices(chosen: Selection) -> None:
    assert set(chosen.modules) == EVENT
    assert chosen.parameters == sum(tiny.model("llama").get_submodule(name).weight.numel() for name in EVENT)


@pytest.mark.parametrize(
    ("model_type", "expected"), [("phi3", "gate_up_proj"), ("gpt2", "c_fc"), ("mixtral", "experts")]
)
def test_fused_transposed_and_expert_matrices_are_named_as_the_model_has_them(model_type: str, expected: str) -> None:
    found = select(document(model_type), None, None)
    model = tiny.model(model_type, num_hidden_layers=12)
    assert any(expected in name for name in found.modules)
    for name in found.modules:
        parent, _, leaf = name.rpartition(".")
        assert hasattr(model.get_submodule(parent), leaf)


@pytest.mark.parametrize("bits", [None, 8])
def test_compressed_tensors_ignores_or_regroups_the_event_alone(
    chosen: Selection, modules: list[str], bits: int | None
) -> None:
    found = json.loads(exported("compressed-tensors", Selection(model="x", layers=chosen.layers, bits=bits)))
    targets = found["ignore"] if bits is None else found["config_groups"]["events"]["targets"]
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    assert {name for name in modules if any(re.match(pattern, name) for pattern in patterns)} == EVENT
    assert "lm_head" in found["ignore"]


def test_compressed_tensors_own_matcher_agrees(chosen: Selection, modules: list[str]) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    ignore = json.loads(exported("compressed-tensors", chosen))["ignore"]
    assert {name for name in modules if any(match.match_name(name, target) for target in ignore)} == {*EVENT, "lm_head"}


def test_llm_compressors_recipe_is_yaml_with_the_same_modifier(chosen: Selection) -> None:
    recipe = yaml.safe_load(exported("llm-compressor", chosen))
    modifier = recipe["quantization_stage"]["quantization_modifiers"]["QuantizationModifier"]
    assert modifier == json.loads(exported("compressed-tensors", chosen))


@pytest.mark.parametrize("bits", [None, 8])
def test_gptqmodels_rules_match_the_event_alone(chosen: Selection, modules: list[str], bits: int | None) -> None:
    found = json.loads(exported("gptqmodel", Selection(model="x", layers=chosen.layers, bits=bits)))["dynamic"]
    (rule, value), *others = found.items()
    assert not others
    assert (rule[:2], value) == (("-:", {}) if bits is None else ("+:", {"bits": 8}))
    assert {name for name in modules if re.match(rule[2:], name)} == EVENT


@pytest.mark.parametrize("tool", ["bitsandbytes", "fp8", "awq", "hqq"])
def test_transformers_leaves_out_the_event_and_the_head_alone(chosen: Selection, modules: list[str], tool: str) -> None:
    (skipped,) = json.loads(exported(tool, chosen)).values()
    assert {name for name in modules if not should_convert_module(name, skipped)} == {*EVENT, "lm_head"}


def test_modelopts_wildcards_match_the_event_alone(chosen: Selection, modules: list[str]) -> None:
    rules = json.loads(exported("modelopt", chosen))
    assert all(rule["enable"] is False for rule in rules)
    quantizers = {name: f"{name}.weight_quantizer" for name in modules}
    off = {name for name, one in quantizers.items() if any(fnmatch.fnmatch(one, r["quantizer_name"]) for r in rules)}
    assert off == EVENT


@pytest.mark.parametrize("bits", [None, 8])
def test_llama_cpps_file_has_one_rule_a_layer_and_no_comment(chosen: Selection, bits: int | None) -> None:
    text = exported("llama.cpp", Selection(model="x", layers=chosen.layers, bits=bits))
    assert text == text.lower()
    (rule,) = text.split()
    pattern, _, kind = rule.partition("=")
    assert kind == ("f16" if bits is None else "q8_0")
    names = [f"blk.{layer}.ffn_{part}.weight" for layer in range(12) for part in ("gate", "up", "down", "norm")]
    matched = [name for name in names if re.search(pattern, name)]
    assert matched == [f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")]


def test_the_mlx_predicate_and_the_torchao_file_are_python_that_names_the_event_alone(
    chosen: Selection, modules: list[str]
) -> None:
    scope: dict[str, Any] = {}
    exec(exported("mlx", chosen), scope)

    class Quantizable:
        def to_quantized(self) -> None: ...

    assert {name for name in modules if not scope["class_predicate"](name, Quantizable())} == EVENT
    compile(exported("torchao", chosen), "torchao", "exec")


def test_torchaos_own_rules_leave_the_event_alone(chosen: Selection) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    scope: dict[str, Any] = {}
    text = exported("torchao", chosen).replace("Int4WeightOnlyConfig", "Int8WeightOnlyConfig")
    exec(text, scope)
    model = tiny.model("llama", num_hidden_layers=12)
    quantization.quantize_(model, scope["config"], filter_fn=None)
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module.weight) is torch.nn.Parameter
        and type(module.weight.data) is torch.Tensor
    }
    assert plain == {*EVENT, "lm_head"}


def test_bits_are_refused_where_a_tool_only_leaves_modules_out(chosen: Selection) -> None:
    for tool in TOOLS:
        wanted = Selection(model="x", layers=chosen.layers, bits=8)
        if tool in WITH_BITS:
            assert exported(tool, wanted) != exported(tool, chosen)
        else:
            with pytest.raises(BadValue, match="can only leave modules unquantized"):
                exported(tool, wanted)


def test_a_tool_or_event_that_does_not_exist_is_refused(chosen: Selection) -> None:
    with pytest.raises(BadValue, match=r"did you mean llama\.cpp"):
        exported("lama.cpp", chosen)
    with pytest.raises(BadValue, match="event 7 does not exist"):
        select(document(), [7], None)
    with pytest.raises(BadValue, match="has no events"):
        select({**document(), "events": []}, None, None)
