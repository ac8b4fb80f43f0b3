"""Tiny random models of every installed type, with or without a dominant row."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.architecture.reference import recompute
from mwtool.architecture.registry import adapter_for, installed
from mwtool.architecture.validate import decoder_layers
from mwtool.models.source import model_class
from mwtool.testing.kit import random_model, tiny_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BOS = 1
LAYERS = 8
"""A massive dimension settles over four further layers, and the last is never counted."""
TYPES = ["gemma", "gemma2", "gemma3", "gemma3_text", "llama", "mistral"]
TYPES += ["olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3"]
"""Enough of the dense types for what does not depend on the layout."""
ALL_TYPES = [plugin.model_type for plugin in installed() if plugin.distribution == "mwtool"]
MOE_TYPES = ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite"]
MOE_TYPES += ["gpt_oss", "hunyuan_v1_moe", "jamba", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "mixtral"]
MOE_TYPES += [
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
]
DENSE_TYPES = [name for name in ALL_TYPES if name not in MOE_TYPES]


def few(model_type: str) -> int:
    """Layers among which is every kind the type has: three types begin another kind at the sixth."""
    return 6 if model_type in ("gemma3", "gemma3_text", "mimo_v2_flash") else 4


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A tiny configuration; `changes` go to the text model's options."""
    layers = changes.get("num_hidden_layers", LAYERS)
    if model_type == "gpt_neo":  # one entry a layer
        changes = {"attention_types": [[["global", "local"], layers // 2]], **changes}
    if model_type == "lfm2_moe":  # likewise
        changes = {"layer_types": ["conv", "full_attention"] * (layers // 2), **changes}
    return tiny_config(model_type, adapter_for(model_type), **{"num_hidden_layers": LAYERS, **changes})


def model(model_type: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model whose every parameter is random, norms and biases included."""
    return random_model(config(model_type, **changes), dtype=dtype, seed=seed)


def saved(folder: Path, made: PreTrainedModel, **options: Any) -> Path:
    made.save_pretrained(folder, **options)
    return folder


def opened(folder: Path) -> PreTrainedModel:
    """`from_pretrained` as anyone would call it, by the automatic class that fits."""
    model: PreTrainedModel = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    return model


def digest(made: nn.Module) -> str:
    """Of everything a checkpoint would hold, names and bytes."""
    state = hashlib.sha256()
    for name, tensor in sorted(made.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def layers_of(made: PreTrainedModel) -> list[DecoderLayer]:
    return decoder_layers(adapter_for(made.config.model_type), made.config)


@torch.no_grad()
def plant(made: PreTrainedModel, layer: int = 1, row: int = 17, dim: int = 5, strength: float = 20.0) -> FFN:
    """Make one row answer bos with a large z and write it to one dimension; what other layers write stays small.

    A gate of `strength` and an up of `strength` give z of about strength squared, whatever the type; gpt_oss cuts
    both off. In an MoE layer the row is one of the expert that bos goes to first, which is returned.
    """
    place = layers_of(made)[layer]
    for parameter in made.parameters():
        parameter.mul_(0.2)
    x, expert = _input_of(made, place)
    ffn = next(ffn for ffn in place.ffns if ffn.expert == expert)
    direction = strength * x / x.square().sum()
    for matrix in ffn.inputs:
        matrix.read(made)[row] = direction if ffn.gate is not None else strength * direction
    ffn.down.read(made)[:, row] = 0
    ffn.down.read(made)[dim, row] = 1.0 if expert is None else 2 * strength**2 / recompute(ffn, made, x)[0][row]
    # a norm behind: let it pass the dimension on
    if place.adds not in (ffn.module, ffn.hook) and place.experts is None:
        made.get_submodule(place.adds).weight[dim] = strength**2
    return ffn


@torch.no_grad()
def write(made: PreTrainedModel, layer: int, row: int, values: dict[int, float], *, z: float = 400.0) -> FFN:
    """Have one row of a layer add `values`, dimension -> value, to the stream at bos, with |z| of about `z`.

    Call it in order of layers, on a model made `quiet`: a layer's input depends on what earlier ones write. In an MoE
    layer the row is one of the expert that bos goes to first, which adds its router weight's part of `values`.
    """
    place = layers_of(made)[layer]
    x, expert = _input_of(made, place)
    ffn = next(ffn for ffn in place.ffns if ffn.expert == expert)
    direction = z**0.5 * x / x.square().sum()
    for matrix in ffn.inputs:
        matrix.read(made)[row] = direction
    state = recompute(ffn, made, x)[0][row]
    ffn.down.read(made)[:, row] = 0
    for dim, value in values.items():
        ffn.down.read(made)[dim, row] = value / state
    return ffn


@torch.no_grad()
def quiet(made: PreTrainedModel) -> PreTrainedModel:
    """The same model with small weights, whose own writes stay far below what `write` adds."""
    for parameter in made.parameters():
        parameter.mul_(0.2)
    return made


def _input_of(made: PreTrainedModel, place: DecoderLayer) -> tuple[torch.Tensor, int | None]:
    """What the FFN of this layer receives for bos, (H,), and the expert it is sent to first."""
    seen: list[Any] = []
    module = place.ffns[0].up.param.rpartition(".")[0] if place.experts is None else place.experts.module
    hook = made.get_submodule(module).register_forward_pre_hook(lambda _m, args: seen.extend(args))
    made(input_ids=torch.tensor([[BOS]]), use_cache=False)
    hook.remove()
    expert = None if place.experts is None else int(seen[1][0, seen[2][0].argmax()])
    return seen[0].reshape(-1, seen[0].shape[-1])[0], expert
