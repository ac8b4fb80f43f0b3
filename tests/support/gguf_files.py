"""GGUF files of tiny models, written as llama.cpp's converters write them, and the checkpoints they amount to.

The changes of layout are spelled out once more here, after those converters, and names are gguf-py's own, so
that what the package undoes is held against what llama.cpp does and not against itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import tiny
import torch
from safetensors.torch import save_file

from mwtool.demo import __file__ as demo

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""Model type -> what llama.cpp calls it."""
Kind = gguf.GGMLQuantizationType
F32 = Kind.F32
TOKENIZER = json.loads((Path(demo).parent / "tokenizer.json").read_text(encoding="utf-8"))


def written(
    path: Path,
    model: PreTrainedModel,
    kind: Kind = F32,
    *,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    split: int | None = None,
    without: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write a model as a GGUF file whose matrices are of this kind; gives what it holds in transformers' terms.

    change: called with the writer before it writes; split: tensors a part at most;
    without: a tensor to leave out.
    The tensors returned, float32, are dequantized by gguf-py and put back by an index, by checkpoint name.
    """
    arch = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split or 0)
    describe(writer, model.config)
    held: dict[str, torch.Tensor] = {}
    for name, (stored, back) in converted(model, arch).items():
        if name == without:
            continue
        blocks, numbers = packed(stored, kind if stored.ndim > 1 else F32)
        writer.add_tensor(name, blocks, raw_dtype=kind if stored.ndim > 1 else F32)
        held |= back(numbers)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def folder(path: Path, config: PretrainedConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Path:
    """The same model as a Hugging Face folder, cast to a dtype."""
    path.mkdir()
    config.dtype = dtype
    config.save_pretrained(path)
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    return path


Back = Callable[[np.ndarray], dict[str, torch.Tensor]]


def converted(model: PreTrainedModel, arch: str) -> dict[str, tuple[np.ndarray, Back]]:
    """GGUF's name -> the tensor as llama.cpp stores it, and the way back, for a model's whole checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    config = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    state = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    plain = {name: value.float().numpy() for name, value in revert_weight_conversion(model, state).items()}
    result: dict[str, tuple[np.ndarray, Back]] = {}
    for name, stack in _experts_stacked(plain).items():
        ending = "." + name.rpartition(".")[2]
        stored = f"{names.get_name(name.removesuffix(ending))}{ending}"
        assert not stored.startswith("None"), name
        value, order = stack[0], None
        if len(stack) > 1 or ".experts." in name:
            value = np.stack(stack)
        elif arch == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            order = permuted(np.arange(len(value)), heads)
            value = value[order]
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        elif "shared_expert_gate" in name:
            value = value[0]
        result[stored] = (np.ascontiguousarray(value), _back(name, order, arch))
    return result


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's conversion/llama.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def _experts_stacked(plain: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    stacks: dict[str, list[np.ndarray]] = {}
    for name, value in plain.items():
        before, between, after = name.partition(".experts.")
        part = after.partition(".")[2]
        # the name that gguf-py's table has for the experts of a layer together
        renamed = {"w1.weight": "w1.weight", "w2.weight": "w2.weight", "w3.weight": "w3.weight"}.get(part)
        if between and renamed:
            layer = before.split(".")[2]
            stacks.setdefault(f"layers.{layer}.feed_forward.experts.{part}", []).append(value)
        else:
            stacks.setdefault(f"{before}.experts.{part}" if between else name, []).append(value)
    return stacks


def _back(name: str, order: np.ndarray | None, arch: str) -> Back:
    def back(numbers: np.ndarray) -> dict[str, torch.Tensor]:
        if ".experts." in name:
            return {_expert_name(name, index): torch.from_numpy(one.copy()) for index, one in enumerate(numbers)}
        value = numbers.copy()
        if order is not None:
            value[order] = numbers
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value - np.float32(1)
        return {name: torch.from_numpy(value[None] if "shared_expert_gate" in name else value)}

    return back


def _expert_name(name: str, index: int) -> str:
    if name.startswith("layers."):  # Mixtral's, in gguf-py's table
        layer, part = name.split(".")[1], name.split(".experts.")[1]
        return f"model.layers.{layer}.block_sparse_moe.experts.{index}.{part}"
    return name.replace(".experts.", f".experts.{index}.")


def packed(value: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Blocks, and the float32 numbers in them. Of K-quants, which gguf-py does not quantize to, random ones."""
    try:
        blocks = gguf.quantize(value, kind)
    except NotImplementedError:
        width, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows = value.size // value.shape[-1]
        random = np.random.default_rng(value.size).integers(0, 256, (rows, value.shape[-1] // width, nbytes), np.uint8)
        scales = np.full((rows, value.shape[-1] // width, 1), 2e-4, np.float16).view(np.uint8)
        random[..., SCALES[kind]] = np.tile(scales, len(SCALES[kind]) // 2)
        blocks = random.reshape(*value.shape[:-1], -1)
    return blocks, gguf.dequantize(blocks, kind).astype(np.float32).reshape(value.shape)


SCALES = {Kind.Q4_K: [0, 1, 2, 3], Kind.Q6_K: [208, 209]}
"""Where the float16 scales of a block lie; anything may stand elsewhere."""


def describe(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """The metadata that llama.cpp's converters write for these types."""
    writer.add_name(f"Tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters.get("full_attention", parameters)["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("llama", "mistral", "mixtral", "phi3"):
        writer.add_rope_dimension_count(width)
    if config.model_type not in ("phi3", "qwen2", "qwen2_moe"):
        writer.add_key_length(width)
        writer.add_value_length(width)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("sliding_window", writer.add_sliding_window),
    ):
        if getattr(config, name, None) and config.model_type != "mistral":
            add(getattr(config, name))
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    tokenizer(writer, config.vocab_size)


def tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """As many tokens of the bundled model's tokenizer as the model has rows."""
    model = TOKENIZER["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)[:size]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), size)]
    merges = [" ".join(pair) for pair in model["merges"] if all(part in tokens for part in (*pair, "".join(pair)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([3 if index < 3 else 1 for index in range(size)])
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(value=True)


def plain(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of widths that every block fits into: 256 and 512."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return tiny.model(model_type, hidden_size=256, intermediate_size=512, num_hidden_layers=2, **{**heads, **changes})


def small(model_type: str) -> PreTrainedModel:
    """A tiny model of a type, with experts in every layer where it has any, as llama.cpp expects."""
    every: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1} if "moe" in model_type else {}
    if model_type == "qwen3_moe":
        every["norm_topk_prob"] = True  # as all released models of the type, and llama.cpp's graph
    return tiny.model(model_type, num_hidden_layers=3, **every)
