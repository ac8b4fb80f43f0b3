"""Every built-in adapter describes its models truly, and what it cannot describe it refuses by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

from mwtool import Settings, scan_checkpoint, scan_model
from mwtool.architecture.layout import DecoderLayer
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.cli import app
from mwtool.errors import UnsupportedModel
from mwtool.models.locate import locate
from mwtool.models.streaming import open_stream
from mwtool.scan.capture import LayerState, walk
from mwtool.testing.kit import check_adapter, check_type, tiny_config

MORE_TYPES = [model_type for model_type in tiny.ALL_TYPES if model_type not in tiny.TYPES]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("ernie4_5", {"use_bias": True}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("granite", {"residual_multiplier": 0.3}),
    ("llama", {"mlp_bias": True}),
    ("opt", {"enable_bias": False}),
    ("stablelm", {"use_parallel_residual": True}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("opt", {"do_layer_norm_before": False}, "opt-350m"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact"),
]


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_every_built_in_adapter_conforms(model_type: str) -> None:
    result = check_type(model_type, adapter_for(model_type))
    assert result.fault is None
    assert [check.name for check in result.checks] == list(result.names)


@pytest.mark.parametrize(("model_type", "options"), VARIANTS, ids=str)
def test_adapters_follow_the_options_of_a_type(model_type: str, options: dict[str, Any]) -> None:
    adapter = adapter_for(model_type)
    check_adapter(adapter, tiny_config(model_type, adapter, **options))


@pytest.mark.parametrize(("model_type", "options", "named"), REFUSED, ids=str)
def test_what_a_layout_cannot_express_is_refused_by_name(model_type: str, options: dict[str, Any], named: str) -> None:
    adapter = adapter_for(model_type)
    with pytest.raises(UnsupportedModel, match=named):
        decoder_layers(adapter, tiny_config(model_type, adapter, **options))


@pytest.mark.parametrize("model_type", MORE_TYPES)
def test_a_planted_row_is_found_in_a_streamed_checkpoint(tmp_path: Path, model_type: str) -> None:
    model = tiny.model(model_type, num_hidden_layers=tiny.few(model_type))
    ffn = tiny.plant(model, layer=1, row=11, dim=5)
    found, whole = scan_checkpoint(str(tiny.saved(tmp_path, model))), scan_model(model)
    assert found.massive is not None
    assert whole.massive is not None
    massive = found.massive
    assert (massive.layer, massive.expert, massive.indices[0], massive.dimension) == (1, ffn.expert, 11, 5)
    assert (massive.module, massive.count) == (ffn.module, 1)
    assert massive.indices == whole.massive.indices
    assert found.identity.experts == whole.identity.experts


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_a_checkpoint_with_images_is_scanned(tmp_path: Path, model_type: str) -> None:
    """As such checkpoints are published: the whole model saved, the language model a part of it."""
    text = tiny.model(model_type)
    ffn = tiny.plant(text, layer=1, row=11, dim=5)
    whole = AutoModelForImageTextToText.from_config(tiny.config(model_type))
    whole.model.language_model.load_state_dict(text.model.state_dict())
    found = scan_checkpoint(str(tiny.saved(tmp_path, whole))).massive
    assert found is not None
    assert (found.layer, found.expert, found.indices[0], found.dimension) == (1, ffn.expert, 11, 5)


def test_a_model_with_images_around_another_language_model_is_refused_by_name() -> None:
    config = AutoConfig.for_model("llava", text_config={"model_type": "bloom"})
    with pytest.raises(UnsupportedModel, match="the language model of this llava is a bloom; read are llama, "):
        decoder_layers(adapter_for("llava"), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("model_type", tiny.MOE_TYPES)
def test_a_streamed_mixture_routes_as_the_full_model_does(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    """Experts in order, their weights, and all states.

    To 1e-5 of the largest entry in float32, one rounding (2^-7) in bf16: with fewer experts in memory kernels sum in
    another order.
    """
    folder = tiny.saved(tmp_path, tiny.model(model_type, dtype, num_hidden_layers=tiny.few(model_type)))
    full = scan_model(AutoModelForCausalLM.from_pretrained(folder))
    streamed = scan_checkpoint(str(folder))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert any(len(state.parts) > 1 for state in streamed.states)
    for ours, theirs in zip(streamed.states, full.states, strict=True):
        assert [part.ffn.expert for part in ours.parts] == [part.ffn.expert for part in theirs.parts]
        for one, other in zip(ours.parts, theirs.parts, strict=True):
            assert close(one.intermediate, other.intermediate, tolerance)
            assert other.weight is None or one.weight == pytest.approx(other.weight, rel=tolerance)
        for name in ("hidden", "added"):
            assert close(getattr(ours, name), getattr(theirs, name), tolerance)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize("model_type", tiny.MOE_TYPES)
def test_the_hidden_states_of_a_streamed_mixture_are_those_transformers_gives(tmp_path: Path, model_type: str) -> None:
    folder = tiny.saved(tmp_path, tiny.model(model_type, num_hidden_layers=tiny.few(model_type)))
    streamed = scan_checkpoint(str(folder)).states
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(folder)
        hidden = full(input_ids=torch.tensor([[tiny.BOS]]), output_hidden_states=True).hidden_states
    for state, reference in zip(streamed[:-1], hidden[1:-1], strict=True):  # the last is after the final norm
        assert close(state.hidden, reference[0, 0].double(), 1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_experts_that_bos_is_not_routed_to_are_never_read(tmp_path: Path, model_type: str) -> None:
    """Their tensors, or their part of a tensor that holds all experts, may be NaN: nobody looks."""
    model = tiny.model(model_type)
    tiny.plant(model, row=11)
    folder = tiny.saved(tmp_path, model)
    before = scan_checkpoint(str(folder))
    tensors = load_file(folder / "model.safetensors")
    spoiled = 0
    for state in before.states:
        routed = {part.ffn.expert for part in state.parts}
        for ffn in tiny.layers_of(model)[state.layer].ffns:
            if ffn.expert is not None and ffn.expert not in routed:
                spoiled += spoil(tensors, state.layer, ffn.expert)
    assert spoiled
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = scan_checkpoint(str(folder))
    assert after.massive == before.massive
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(after.states, before.states, strict=True))


def spoil(tensors: dict[str, torch.Tensor], layer: int, expert: int) -> int:
    """Fill one expert's weights in a checkpoint with NaN; returns how many tensors that concerned."""
    apart = [name for name in tensors if f"layers.{layer}." in name and f"experts.{expert}." in name]
    for name in apart:
        tensors[name].fill_(torch.nan)
    together = [name for name in tensors if f"layers.{layer}.mlp.experts.gate_up_proj" in name]
    for name in together:
        tensors[name][expert] = torch.nan
    return len(apart) + len(together)


def test_no_more_experts_than_routed_are_in_memory_at_a_time(tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    source = locate(str(tiny.saved(tmp_path, model)))
    config = source.config()
    layers = decoder_layers(adapter_for("mixtral"), config)
    experts = [layer.experts.module for layer in layers if layer.experts is not None]
    stream = open_stream(source, config, layers)
    sizes: list[int] = []

    def look(module: torch.nn.Module, _args: Any) -> None:
        sizes.extend(parameter.shape[0] for parameter in module.parameters() if not parameter.is_meta)

    def after(_state: LayerState) -> None:
        parameters = [p for path in experts for p in stream.model.get_submodule(path).parameters()]
        assert all(p.is_meta and p.shape[0] == 4 for p in parameters)

    with stream.flowing():
        hooks = [stream.model.get_submodule(path).register_forward_pre_hook(look) for path in experts]
        walk(stream.model, layers, tiny.BOS, spike=50, on_layer=after)
    for hook in hooks:
        hook.remove()
    assert set(sizes) == {config.num_experts_per_tok}


def test_an_interrupted_mixture_is_left_as_it_was_built(tmp_path: Path) -> None:
    model = tiny.model("gpt_oss")
    source = locate(str(tiny.saved(tmp_path, model)))
    layers = tiny.layers_of(model)
    experts = [layer.experts.module for layer in layers if layer.experts is not None]
    stream = open_stream(source, source.config(), layers)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = stream.model.get_submodule(experts[2]).register_forward_hook(interrupt)
    with stream.flowing(), pytest.raises(KeyboardInterrupt):
        stream.model(input_ids=torch.tensor([[tiny.BOS]]), use_cache=False)
    handle.remove()
    assert {name: p.shape for name, p in stream.model.named_parameters()} == shapes
    assert all(p.is_meta for p in stream.model.parameters())


def test_an_absent_expert_is_an_incomplete_checkpoint(tmp_path: Path) -> None:
    from mwtool import MwtoolError

    folder = tiny.saved(tmp_path, tiny.model("mixtral"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MwtoolError, match=r"3 tensors like .*w1\.weight .*expected 4"):
        scan_checkpoint(str(folder))


def test_dense_and_moe_layers_of_one_model_may_both_be_massive(tmp_path: Path) -> None:
    """qwen2_moe's tiny model has a dense third layer, wider than its experts."""
    model = tiny.model("qwen2_moe")
    assert [len(layer.ffns) for layer in tiny.layers_of(model)[1:4]] == [5, 1, 5]
    tiny.plant(model, layer=2, row=40)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model)))
    assert found.massive is not None
    assert (found.massive.layer, found.massive.expert, found.massive.indices[0]) == (2, None, 40)
    assert found.router is None


def test_a_shared_expert_that_carries_the_dimension_is_named(tmp_path: Path) -> None:
    model = tiny.model("deepseek_v3")
    routed = tiny.plant(model, row=11)
    layer = tiny.layers_of(model)[1]
    shared = layer.ffns[-1]
    with torch.no_grad():
        move(routed, shared, model)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model)))
    assert found.massive is not None
    assert found.router is not None
    assert (found.massive.module, found.massive.expert) == ("model.layers.1.mlp.shared_experts", None)
    assert found.router.shared_share == pytest.approx(1, abs=0.05)
    assert sum(choice.share for choice in found.router.choices) + found.router.shared_share == pytest.approx(1)


def move(source: Any, target: Any, model: torch.nn.Module) -> None:
    """A row of one network goes to another."""
    for ours, theirs in zip(source.inputs, target.inputs, strict=True):
        theirs.read(model)[11] = ours.read(model)[11]
        ours.read(model)[11] = 0
    target.down.read(model)[:, 11] = source.down.read(model)[:, 11]


def test_the_places_to_protect_are_the_experts_rows_and_no_other_experts(tmp_path: Path) -> None:
    """Zeroing exactly the places listed takes the massive dimension away; every other expert is untouched."""
    for model_type in ("mixtral", "gpt_oss"):
        model = tiny.model(model_type)
        tiny.plant(model, row=11)
        found = scan_checkpoint(str(tiny.saved(tmp_path / model_type, model)), Settings(k=1))
        for place in found.protect:
            assert place.expert is not None
            parameter = model.get_parameter(place.parameter).data[place.expert]
            for index in place.indices:
                parameter.select(place.dim - 1, index).zero_()
        assert scan_model(model).massive is None


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_command_line_finds_rows_of_one_expert(tmp_path: Path, model_type: str) -> None:
    model = tiny.model(model_type)
    ffn = tiny.plant(model, layer=2, row=23, dim=7)
    document = run("scan", str(tiny.saved(tmp_path, model)))
    massive, router = document["massive"], document["router"]
    assert (massive["layer"], massive["expert"], massive["indices"][0]) == (2, ffn.expert, 23)
    assert massive["dimension"] == 7
    assert document["shape"]["experts"] == 4
    assert router["layer"] == 2
    assert {choice["expert"] for choice in router["probabilities"]} >= {ffn.expert}
    assert sum(choice["share"] for choice in router["probabilities"]) == pytest.approx(1)
    assert all(0 < choice["probability"] < 1 for choice in router["probabilities"])
    assert {place["expert"] for place in document["weights"]} == {ffn.expert}
    text = CliRunner().invoke(app, ["scan", str(tmp_path)]).stdout
    assert f"The rows are those of expert {ffn.expert}." in text


def test_probabilities_are_the_routers_own(tmp_path: Path) -> None:
    """Against the router run by hand on what it received."""
    model = tiny.model("mixtral")
    seen: list[torch.Tensor] = []
    gate = model.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    parts = scan_model(model).states[1].parts
    hook.remove()
    logits = seen[0][0].double() @ gate.weight.detach().double().T  # (E,)
    expected = logits.softmax(-1)
    for part in parts:
        assert part.ffn.expert is not None
        assert part.probability == pytest.approx(float(expected[part.ffn.expert]), rel=1e-5)


def test_a_rank_beyond_an_experts_width_is_refused(tmp_path: Path) -> None:
    from mwtool import MwtoolError

    model = tiny.model("deepseek_v3")
    tiny.plant(model, row=11)
    with pytest.raises(MwtoolError, match="16 rows"):
        scan_checkpoint(str(tiny.saved(tmp_path, model)), Settings(k=17))


def test_every_layer_of_a_layout_is_described_once() -> None:
    mixtures = []
    for model_type in tiny.ALL_TYPES:
        layers: list[DecoderLayer] = decoder_layers(adapter_for(model_type), tiny.config(model_type))
        assert len({layer.path for layer in layers}) == tiny.LAYERS
        mixtures += [model_type] if any(layer.experts for layer in layers) else []
    assert mixtures == sorted(tiny.MOE_TYPES)
