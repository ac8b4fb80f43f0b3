"""Tiny random models of every supported type, with or without a dominant row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mwtool.layout import DecoderLayer
from mwtool.registry import adapter_for
from mwtool.scan import decoder_layers

BOS = 1
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "olmo": COMMON,
    "olmo2": COMMON,
    "gemma": {**COMMON, "head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3": {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4},
    "phi": COMMON,
    "phi3": COMMON,
}
TYPES = sorted(OPTIONS)


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A tiny configuration; `changes` go to the text model's options."""
    options = dict(OPTIONS[model_type])
    if "text_config" in options:
        options["text_config"] = {**options["text_config"], **changes}
    else:
        options |= changes
    return AutoConfig.for_model(model_type, **options)


def model(model_type: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(model_type, **changes), dtype=dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def saved(folder: Path, made: PreTrainedModel, **options: Any) -> Path:
    made.save_pretrained(folder, **options)
    return folder


def layers_of(made: PreTrainedModel) -> list[DecoderLayer]:
    return decoder_layers(adapter_for(made.config.model_type), made.config)


@torch.no_grad()
def plant(made: PreTrainedModel, layer: int = 1, row: int = 17, dim: int = 5, strength: float = 20.0) -> None:
    """Make one row answer bos with a large z and write it to one dimension; what other layers write stays small.

    A gate of `strength` and an up of `strength` give z of about strength squared, whatever the type.
    """
    place = layers_of(made)[layer]
    ffn = place.ffns[0]
    for parameter in made.parameters():
        parameter.mul_(0.2)
    x = _input_of(made, place, ffn.module)
    direction = strength * x / x.square().sum()
    for matrix in ffn.inputs:
        matrix.read(made)[row] = direction if ffn.gate is not None else strength * direction
    ffn.down.read(made)[:, row] = 0
    ffn.down.read(made)[dim, row] = 1.0
    if place.adds != ffn.module:  # a norm behind the FFN: let it pass the dimension on
        made.get_submodule(place.adds).weight[dim] = strength**2


def _input_of(made: PreTrainedModel, place: DecoderLayer, module: str) -> torch.Tensor:
    """What the FFN of this layer receives for bos, (H,)."""
    seen: list[torch.Tensor] = []
    hook = made.get_submodule(module).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])[0])
    )
    made(input_ids=torch.tensor([[BOS]]), use_cache=False)
    hook.remove()
    return seen[0]
