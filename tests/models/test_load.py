"""A model is loaded whole with the places of its FFNs, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mwtool.ablation.controls import norm_rows
from mwtool.architecture.validate import ffn_at
from mwtool.errors import BadCheckpoint, BadValue, ModelNotFound, UnsupportedModel
from mwtool.evaluation.chunked_loss import head_of
from mwtool.models.load import Loaded, load
from mwtool.scan.loaded import massive_for
from mwtool.scan.scanner import scan_checkpoint, scan_model
from mwtool.scan.targets import Target
from mwtool.surgery.attack import Attack, edited

IDS = torch.tensor([[tiny.BOS, 5, 9, 3]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def saved(folder: Path, **changes: Any) -> tuple[Path, PreTrainedModel]:
    model = tiny.model("llama", num_hidden_layers=4, **changes)
    return tiny.saved(folder, model), model


def with_adapter(folder: Path) -> tuple[Path, PeftModel]:
    """An adapter whose part of the sum is far from zero, beside its base model."""
    base, _ = saved(folder / "base")
    targets = ["up_proj", "q_proj"]
    wrapped: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter", wrapped.eval()


def test_a_loaded_model_is_the_one_transformers_loads(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    loaded = load(str(folder))
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model is loaded.base
    assert not loaded.model.training
    assert (loaded.on, loaded.tokenizer, len(loaded.layers)) == (None, None, 4)
    assert (loaded.identity.hidden_size, loaded.identity.intermediate_size, loaded.identity.experts) == (32, 64, None)


NO_WEIGHT = {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}


@pytest.mark.parametrize("stored", NO_WEIGHT)
@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_numbers_without_their_scale_are_no_weights(tmp_path: Path, tensor: str, stored: str, file: str) -> None:
    """transformers would cast them and go on; an adapter's base model is loaded alike."""
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = (tensors[tensor] * 40).to(NO_WEIGHT[stored])
    save_file(tensors, folder / "model.safetensors")
    found = stored
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / file)
        found = str(NO_WEIGHT[stored]).removeprefix("torch.")
    expected = rf"tensor {tensor} holds {found}; expected floating point of 16 bits or more, .* no quantization_config"
    with pytest.raises(BadCheckpoint, match=expected):
        load(str(folder))
    if tensor != "model.norm.weight":  # behind the layers, where a scan does not come
        with pytest.raises(BadCheckpoint, match=expected):
            scan_checkpoint(str(folder))


def test_numbers_without_their_scale_are_not_quantized_once_more(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import BitsAndBytesConfig

    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds I8"):
        load(str(folder), model_options={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})


@pytest.mark.parametrize(
    ("model_type", "mask"),
    [
        ("gpt_neox", "gpt_neox.layers.{}.attention.bias"),
        ("gpt2", "h.{}.attn.bias"),
        ("gptj", "transformer.h.{}.attn.bias"),
    ],
)
def test_masks_that_transformers_once_saved_are_passed_over(tmp_path: Path, model_type: str, mask: str) -> None:
    """Every pythia has them, in bits."""
    model = tiny.model(model_type, torch.bfloat16)
    tiny.plant(model)
    folder = tiny.saved(tmp_path, model)
    plain = scan_checkpoint(str(folder))
    tensors = load_file(folder / "model.safetensors")
    if mask.startswith("h."):  # as released: without the model's prefix
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {mask.format(layer): torch.ones(1, 1, 64, 64, dtype=torch.bool) for layer in range(tiny.LAYERS)}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(load(str(folder)).base), logits(model))
    assert scan_checkpoint(str(folder)).massive == plain.massive


def test_the_precision_asked_for_is_the_one_computed_in(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert load(str(folder)).base.dtype == torch.float32
    assert load(str(folder), dtype="bfloat16").base.dtype == torch.bfloat16


def test_an_adapter_is_kept_apart_or_merged_and_both_compute_the_sum(tmp_path: Path) -> None:
    folder, wrapped = with_adapter(tmp_path)
    expected = logits(wrapped)
    apart, merged = load(str(folder), on="base"), load(str(folder), on="merged")
    assert isinstance(apart.model, PeftModel)
    assert not isinstance(merged.model, PeftModel)
    assert torch.equal(logits(apart.model), expected)
    # the adapter's product is added to the weight or to the output: float32 rounds them apart
    torch.testing.assert_close(logits(merged.model), expected, rtol=1e-4, atol=1e-4)
    assert (apart.on, merged.on) == ("base", "merged")
    assert apart.source.name == str(tmp_path / "base")
    for loaded in (apart, merged):
        for layer in loaded.layers:
            assert layer.ffns[0].up.read(loaded.base).shape == (64, 32)
    base_row = apart.layers[1].ffns[0].up.read(apart.base)
    assert not torch.equal(base_row, merged.layers[1].ffns[0].up.read(merged.base))


def test_rows_below_an_adapter_are_those_of_the_base_model(tmp_path: Path) -> None:
    """The scan of a loaded adapter folder is that of the base model's checkpoint; merged it is that of the sum."""
    model = tiny.model("llama")
    tiny.plant(model)
    tiny.saved(tmp_path / "base", model)
    wrapped: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["up_proj", "gate_proj"]),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    base = scan_checkpoint(str(tmp_path / "base")).massive
    found, _ = massive_for(load(str(tmp_path / "adapter"), on="base"))
    assert found is not None
    assert base is not None
    assert (found.layer, found.indices, found.count) == (base.layer, base.indices, base.count)


def test_an_absent_tensor_is_named_and_never_made_up(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"has no tensor for model.layers.2.mlp.up_proj.weight; it is"):
        load(str(folder))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(60, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"up_proj.weight of .* shape \(60, 32\); config.json makes it \(64, 32\)"):
        load(str(folder))


def test_weights_cut_short_are_refused_in_one_line(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match=r"model.safetensors \([\d,]+ bytes\) is cut short") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_an_adapter_kept_in_a_bin_file_is_applied(tmp_path: Path) -> None:
    folder, wrapped = with_adapter(tmp_path)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    assert torch.equal(logits(load(str(folder)).model), logits(wrapped))


def test_an_adapter_without_its_base_or_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    folder, _ = with_adapter(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(BadCheckpoint, match=r"the adapter .* cannot be applied"):
        load(str(folder))
    weights.unlink()
    with pytest.raises(BadCheckpoint, match=r"the adapter .* has no weights; expected adapter_model\.safetensors or"):
        load(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ModelNotFound, match=r"base model cannot be opened: no such folder"):
        load(str(folder))


def test_an_adapter_of_a_model_of_another_size_is_refused_with_the_shape(tmp_path: Path) -> None:
    folder, _ = with_adapter(tmp_path)
    tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=4, intermediate_size=48))
    with pytest.raises(BadCheckpoint, match=r"cannot be applied: .*: size mismatch for .*up_proj") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_layer_and_an_expert_are_found_by_number_or_refused_by_it() -> None:
    layers = tuple(tiny.layers_of(tiny.model("qwen2_moe", num_hidden_layers=2)))
    assert ffn_at(layers, 1, 3).expert == 3
    assert ffn_at(layers, 1).module.endswith("shared_expert")
    with pytest.raises(BadValue, match="layer 2 does not exist; the model has layers 0 to 1"):
        ffn_at(layers, 2)
    with pytest.raises(BadValue, match=r"layer 1 has experts 0 to \d+; there is no expert 99: change --expert"):
        ffn_at(layers, 1, 99)
    only_routed = tuple(tiny.layers_of(tiny.model("mixtral", num_hidden_layers=2)))
    with pytest.raises(BadValue, match="choose one with --expert"):
        ffn_at(only_routed, 0)


def test_the_width_of_packed_rows_is_known(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import BitsAndBytesConfig

    model = tiny.model("llama", num_hidden_layers=2, hidden_size=64, head_dim=16)
    folder = tiny.saved(tmp_path, model)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)}
    loaded = load(str(folder), model_options=options)
    assert loaded.layers[0].ffns[0].up.read(loaded.base).dtype == torch.uint8
    assert loaded.identity.intermediate_size == 64


def packed(folder: Path, model_type: str, **options: Any) -> Loaded:
    """A model packed into 4 bits as it is loaded, so that no file holds its weights."""
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import BitsAndBytesConfig

    made = tiny.model(model_type, num_hidden_layers=2, hidden_size=64)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **options)}
    return load(str(tiny.saved(folder / "plain", made)), model_options=options)


@pytest.mark.parametrize("stored", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_packed_weights_cannot_be_scanned_and_the_message_says_what_can_be_done(
    tmp_path: Path, model_type: str, stored: str
) -> None:
    """Nor are they ranked by norm: what is stored as floats is packed none the less."""
    loaded = packed(tmp_path, model_type, bnb_4bit_quant_storage=stored)
    with pytest.raises(
        UnsupportedModel, match=rf"quantized \(packed {stored}\) and cannot be scanned; .* give --massive FILE"
    ):
        massive_for(loaded)
    with pytest.raises(UnsupportedModel, match=rf"is quantized \(packed {stored}\) in layer 0 and cannot be scanned"):
        scan_model(loaded.base)
    assert norm_rows(loaded, Target(layer=1, ffn=loaded.layers[1].ffns[0], indices=(3,)), 2) is None


@pytest.mark.parametrize(
    ("model_type", "plain"), [("llama", "model.layers.0"), ("llama", "up_proj"), ("qwen2_moe", "lm_head")]
)
@pytest.mark.parametrize("stored", ["uint8", "bfloat16"])
def test_a_model_packed_in_part_is_not_scanned_either(tmp_path: Path, model_type: str, plain: str, stored: str) -> None:
    """Whatever was left as it is: a layer, one matrix of each, or routed experts beside a shared one."""
    options = {"bnb_4bit_quant_storage": stored, "llm_int8_skip_modules": [plain, "lm_head"]}
    loaded = packed(tmp_path, model_type, **options)
    with pytest.raises(UnsupportedModel, match=rf"quantized \(packed {stored}\) and cannot be scanned"):
        massive_for(loaded)
    with pytest.raises(UnsupportedModel, match=rf"quantized \(packed {stored}\) in layer \d and cannot be scanned"):
        scan_model(loaded.base)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_checkpoint_stored_in_4_bits_is_scanned_from_its_files(tmp_path: Path, model_type: str) -> None:
    loaded = packed(tmp_path, model_type)
    loaded.base.save_pretrained(tmp_path / "4bit")
    stored = load(str(tmp_path / "4bit"))
    scan = scan_checkpoint(str(tmp_path / "4bit"))
    assert massive_for(stored) == (scan.massive, scan.notes)
    assert "were dequantized from bitsandbytes" in scan.notes[0]


@pytest.mark.parametrize("on", ["base", "merged"])
def test_virtual_tokens_are_refused_because_bos_is_then_not_first(tmp_path: Path, on: Any) -> None:
    base, _ = saved(tmp_path / "base")
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        UnsupportedModel, match=r"is PROMPT_TUNING, which puts virtual tokens where bos should be first"
    ):
        load(str(tmp_path / "adapter"), on=on)


def test_where_an_adapter_s_rows_are_taken_out_means_nothing_without_one(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert load(str(folder)).notes == ()
    assert load(str(folder), on="merged").notes == (f"--on merged is ignored: {folder} is no adapter folder",)


def offloaded(folder: Path, *modules: str) -> Loaded:
    """A model whose layer 1 has a dominant row, with these modules on the disk."""
    model = tiny.model("llama")
    tiny.plant(model)
    tiny.saved(folder / "model", model)
    names = {f"model.layers.{index}" for index in range(tiny.LAYERS)}
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *names), "cpu")
    places |= dict.fromkeys(modules, "disk")
    return load(str(folder / "model"), model_options={"device_map": places, "offload_folder": str(folder / "off")})


def test_an_offloaded_model_is_scanned_from_its_files(tmp_path: Path) -> None:
    loaded = offloaded(tmp_path, "model.layers.1", "model.layers.2")
    found, _ = massive_for(loaded)
    assert found == scan_checkpoint(str(tmp_path / "model")).massive
    assert found is not None
    assert (found.layer, found.indices[0]) == (1, 17)
    with pytest.raises(UnsupportedModel, match="is offloaded in layer 1 and cannot be scanned in memory"):
        scan_model(loaded.base)


def test_what_an_offloaded_model_gives_is_what_a_plain_one_gives(tmp_path: Path) -> None:
    """Bit for bit, as it is and attacked, its head taken apart from its body; accelerate's hooks stay."""
    found = offloaded(tmp_path, "model.layers.2", "model.norm", "lm_head")
    plain = load(str(tmp_path / "model"))
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids, dtype=torch.bool).index_fill(1, torch.tensor([0]), value=False)
    for attack in (Attack(), Attack("zero", 1), Attack("retain", 1), Attack()):
        losses = []
        for loaded in (found, plain):
            with edited(loaded.base, loaded.layers[1].ffns[0], [17], attack), torch.no_grad():
                head = head_of(loaded.model, ids[:1])
                assert head.body is not None
                losses.append(head.losses(ids, scored, 40, torch.device("cpu")))
        assert torch.equal(*losses)
        assert found.base.lm_head.weight.is_meta


def test_the_files_of_a_model_left_on_the_disk_stay_as_they_are_under_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would write the base model's files anew, or where the path is absolute below the working directory."""
    folder, _ = with_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    loaded = load("adapter", device_map="auto", model_options={"max_memory": {"cpu": len(before) // 2}})
    assert any(parameter.is_meta for parameter in loaded.base.parameters())
    assert torch.equal(logits(loaded.model), logits(load("adapter").model))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_model_whose_embedding_is_offloaded_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="does not fit: even its embedding is offloaded"):
        offloaded(tmp_path, "model.embed_tokens")
