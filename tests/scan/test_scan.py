"""A streamed scan finds what a full forward finds, and leaves everything as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mwtool import Settings, scan_checkpoint, scan_model
from mwtool.errors import BadCheckpoint
from mwtool.scan.capture import LayerState
from mwtool.testing.kit import random_model


def full_forward(folder: Path) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """`from_pretrained` as anyone would call it, and its own hidden states after each layer but the last, (H,)."""
    model = tiny.opened(folder)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[tiny.BOS]]), output_hidden_states=True).hidden_states
    return model, [state[0, 0].double() for state in states[1:-1]]  # the last one is after the final norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("model_type", tiny.DENSE_TYPES)
def test_streamed_states_equal_the_full_forward(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    folder = tiny.saved(tmp_path, tiny.model(model_type, dtype, num_hidden_layers=tiny.few(model_type)))
    full, hidden = full_forward(folder)
    streamed, whole = scan_checkpoint(str(folder)), scan_model(full)
    assert len(streamed.states) == len(whole.states) == len(hidden) + 1
    for ours, reference in zip(streamed.states, hidden, strict=False):
        assert_equal(ours.hidden, reference, dtype)
    for ours, theirs in zip(streamed.states, whole.states, strict=True):
        for name in ("hidden", "intermediate", "added"):
            assert_equal(getattr(ours, name), getattr(theirs, name), dtype)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Bit for bit in bf16; 1e-5 of the largest entry in float32, where a weight's alignment changes the last bits."""
    if dtype == torch.bfloat16:
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_a_planted_row_is_found_at_its_layer_row_and_dimension(tmp_path: Path, model_type: str) -> None:
    model = tiny.model(model_type)
    tiny.plant(model, layer=1, row=17, dim=5)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model)))
    assert found.massive is not None
    assert (found.massive.layer, found.massive.indices[0], found.massive.dimension) == (1, 17, 5)
    assert found.massive.count == 1
    assert found.massive.shares[0] == pytest.approx(1, abs=0.05)
    assert [event.layer for event in found.events if event.kind == "up"] == [1]
    assert found.massive_event is not None
    assert found.events[found.massive_event].rows == found.massive
    assert len(found.states) == tiny.LAYERS


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_a_partial_walk_finds_what_a_full_one_finds_in_these_layers(tmp_path: Path, model_type: str) -> None:
    """Later layers can only change how long a value lives and what its peak is; here they write nothing."""
    model = tiny.model(model_type)
    tiny.plant(model)
    folder = str(tiny.saved(tmp_path, model))
    part, whole = scan_checkpoint(folder, Settings(last_layer=4)), scan_checkpoint(folder)
    assert (part.partial, whole.partial) == (True, False)
    assert len(part.states) == 5
    assert part.massive == whole.massive
    assert part.protect == whole.protect
    for ours, theirs in zip(part.states, whole.states, strict=False):
        assert torch.equal(ours.hidden, theirs.hidden)


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_what_the_ffn_adds_is_the_difference_of_the_streams(tmp_path: Path, model_type: str) -> None:
    """h_l minus everything else: checked by running each layer again with its FFN part silenced."""
    model = tiny.model(model_type)
    states = scan_model(model).states
    layers = tiny.layers_of(model)
    for state, layer in zip(states, layers, strict=True):
        hook = model.get_submodule(layer.adds).register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
        silenced = scan_model(model).states[state.layer].hidden
        hook.remove()
        torch.testing.assert_close(
            state.hidden - silenced, state.added, rtol=0, atol=1e-5 * float(state.hidden.abs().max())
        )


@pytest.mark.parametrize("model_type", tiny.TYPES)
def test_parameters_to_protect_hold_the_rows_that_carry_the_massive_dimension(tmp_path: Path, model_type: str) -> None:
    """Zeroing exactly the places listed leaves those rows nothing to say but their bias (phi)."""
    model = tiny.model(model_type)
    tiny.plant(model)
    before = scan_model(model)
    assert before.massive is not None
    for place in before.protect:
        parameter = model.get_parameter(place.parameter)
        for index in place.indices:
            parameter.data.select(place.dim, index).zero_()
    rows = list(before.massive.indices)
    after = scan_model(model).states[1].intermediate[rows]
    ffn = tiny.layers_of(model)[1].ffns[0]
    assert after.abs().max() <= (0 if ffn.up_bias is None else 0.5)
    assert before.states[1].intermediate[rows[0]].abs() > 100
    assert not ffn.down.read(model)[:, rows].any()


def test_a_model_without_massive_activations_gives_none_and_the_figures(tmp_path: Path) -> None:
    found = scan_checkpoint(str(tiny.saved(tmp_path, tiny.model("llama"))))
    assert found.massive is None
    assert found.absence == "no massive dimension"
    assert (found.events, found.dimensions, found.protect, found.massive_event) == ((), (), (), None)
    assert len(found.states) == 8


def test_tied_parameters_count_once(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny.model("llama", tie_word_embeddings=tied)
        found = scan_checkpoint(str(tiny.saved(tmp_path / str(tied), model)))
        assert found.parameters == sum(p.numel() for p in model.parameters())


def test_share_of_parameters_is_two_k_h_over_all(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tiny.plant(model)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model)), Settings(k=3))
    assert found.massive is not None
    assert found.massive.share_of_parameters == 2 * 3 * 32 / sum(p.numel() for p in model.parameters())


def test_row_shares_and_count_agree_with_a_plain_recomputation(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tiny.plant(model)
    found = scan_model(model, settings=Settings(k=64))
    assert found.massive is not None
    z = found.states[1].intermediate
    parts = model.model.layers[1].mlp.down_proj.weight[5].detach().double() * z
    order = sorted(range(64), key=lambda i: -abs(float(z[i])))
    assert list(found.massive.indices) == order
    assert found.massive.shares == pytest.approx([float(parts[i] / parts.sum()) for i in order], rel=1e-12)
    sums = [float(parts[order[: n + 1]].sum() / parts.sum()) for n in range(64)]
    assert found.massive.count == next(n for n, s in enumerate(sums, start=1) if s >= 0.9)


def test_scanning_in_memory_leaves_weights_hooks_and_mode_alone() -> None:
    model = tiny.model("llama").train()
    before = tiny.digest(model)
    scan_model(model)
    assert model.training
    assert tiny.digest(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_what_is_not_finite_in_memory_is_named(name: str) -> None:
    model = tiny.model("llama")
    model.lm_head.weight.data.fill_(torch.nan)  # never reached
    model.model.layers[5].mlp.up_proj.weight.data.fill_(torch.nan)  # nor this
    model.get_parameter(name).data[tiny.BOS] = torch.inf
    with pytest.raises(BadCheckpoint, match=f"tensor {name} holds NaN or inf"):
        scan_model(model)


def test_a_peft_wrapped_model_is_scanned_as_the_base_it_wraps() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny.model("llama")
    tiny.plant(model)
    plain = scan_model(model).massive
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert scan_model(wrapped).massive == plain  # LoRA's B is zero: nothing has changed yet


def test_the_checkpoint_is_never_written(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path, tiny.model("llama"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    scan_checkpoint(str(folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_no_more_than_one_decoder_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Counted at every layer's end from inside the walk: all other layers are on the meta device."""
    from mwtool.architecture.registry import adapter_for
    from mwtool.architecture.validate import decoder_layers
    from mwtool.models.locate import locate
    from mwtool.models.streaming import open_stream
    from mwtool.scan.capture import walk

    source = locate(str(tiny.saved(tmp_path, tiny.model("llama"))))
    config = source.config()
    layers = decoder_layers(adapter_for("llama"), config)
    stream = open_stream(source, config, layers)
    present: list[set[str]] = []

    def look(_state: LayerState) -> None:
        present.append({name for name, p in stream.model.named_parameters() if not p.is_meta})

    with stream.flowing() as model:
        walk(model, layers, tiny.BOS, spike=50, on_layer=look)
    for index, names in enumerate(present):
        assert names
        assert all(name.startswith(f"model.layers.{index}.") for name in names)
    assert all(p.is_meta for p in stream.model.parameters())


def test_of_the_embedding_only_the_row_of_bos_is_read(tmp_path: Path) -> None:
    """Every other row may be NaN: nobody looks."""
    model = tiny.model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[torch.arange(64) != tiny.BOS] = float("nan")
    assert len(scan_checkpoint(str(tiny.saved(tmp_path, model))).states) == 8


@pytest.mark.parametrize("model_type", ["llama", "opt", "xglm", "gemma3"])
def test_a_padding_token_anywhere_in_the_vocabulary_changes_nothing(tmp_path: Path, model_type: str) -> None:
    config = tiny.config(model_type)
    config.get_text_config().pad_token_id = 7
    model = random_model(config, dtype=torch.float32, seed=0)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model))).states
    for streamed, whole in zip(found, scan_model(model).states, strict=True):
        assert_equal(streamed.hidden, whole.hidden, torch.float32)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_are_found_under_either_name(tmp_path: Path, kept: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.saved(tmp_path, tiny.model("llama", torch.bfloat16, tie_word_embeddings=True))
    expected = scan_checkpoint(str(folder)).states[0].hidden
    tensors = load_file(folder / "model.safetensors")
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(scan_checkpoint(str(folder)).states[0].hidden, expected)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_of_the_base_model_is_read_too(tmp_path: Path, prefix: str) -> None:
    """Some repositories hold names without the `model.` in front."""
    from safetensors.torch import load_file, save_file

    folder = tiny.saved(tmp_path, tiny.model("llama", torch.bfloat16))
    expected = scan_checkpoint(str(folder)).states[-1].hidden
    tensors = {
        name.replace("model.", prefix, 1): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(scan_checkpoint(str(folder)).states[-1].hidden, expected)


def test_shards_and_legacy_files_give_the_same_states(tmp_path: Path) -> None:
    model = tiny.model("llama", torch.bfloat16)
    single = tiny.saved(tmp_path / "single", model)
    sharded = tiny.saved(tmp_path / "sharded", model, max_shard_size="20KB")
    legacy = tiny.saved(tmp_path / "legacy", model)
    (legacy / "model.safetensors").unlink()
    torch.save(model.state_dict(), legacy / "pytorch_model.bin")
    pieces = in_two_legacy_files(tiny.saved(tmp_path / "pieces", model), model)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    scans = [scan_checkpoint(str(folder)) for folder in (single, sharded, legacy, pieces)]
    for other in scans[1:]:
        for ours, theirs in zip(scans[0].states, other.states, strict=True):
            assert torch.equal(ours.hidden, theirs.hidden)
    for scan in scans[2:]:
        assert any("opened whole" in note for note in scan.notes)


def in_two_legacy_files(folder: Path, model: PreTrainedModel) -> Path:
    """The tensors in turn in two `.bin` files, and their index."""
    (folder / "model.safetensors").unlink()
    places = {name: f"pytorch_model-{at % 2}.bin" for at, name in enumerate(model.state_dict())}
    for file in set(places.values()):
        torch.save({name: t for name, t in model.state_dict().items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_obeyed(tmp_path: Path, dtype: str) -> None:
    folder = tiny.saved(tmp_path, tiny.model("llama"))
    found = scan_checkpoint(str(folder), dtype=dtype)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert found.dtype == dtype
    assert_equal(found.states[-1].hidden, scan_model(full).states[-1].hidden, getattr(torch, dtype))
