"""Quantized checkpoints: which methods can be dequantized, and how packed weights without a scale are detected."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mwtool.architecture.packed import is_packed
from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models.checkpoint import Checkpoint
from mwtool.models.dequantize import dequantized
from mwtool.models.key_mapping import tensor_map
from mwtool.models.packed_formats import FORMATS, format_of
from mwtool.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEQUANTIZABLE = ("fp8", "mxfp4")
"""Quantization methods whose checkpoints transformers can dequantize on any device."""
PACKED = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "SCB")
"""How names end that bitsandbytes stores beside the weights it packed, in 4 bits and in 8."""
PLAIN = ("F16", "BF16", "F32", "F64", "FLOAT16", "BFLOAT16", "FLOAT32", "FLOAT64")
"""Dtypes of weights that need no scale, as named by safetensors, then by torch."""


def dequantizable(config: PretrainedConfig) -> bool:
    """Whether a checkpoint of this configuration is quantized by a method that can be dequantized."""
    return _method(config) in (*DEQUANTIZABLE, *FORMATS)


def _method(config: PretrainedConfig) -> str | None:
    """The quantization method of the checkpoint; None if it is not quantized."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    return str(stated.get("quant_method", "unknown") if isinstance(stated, dict) else stated.quant_method)


def refuse_fp8_fault(source: Source, config: PretrainedConfig) -> None:
    """Raise UnsupportedModel for FP8 before transformers 5.17, which fails over the tensor-parallel plans of models."""
    release = tuple(int(part) for part in version("transformers").split(".")[:2])
    if _method(config) == "fp8" and release < (5, 17):
        raise UnsupportedModel(
            f"{source.name} is stored in FP8, which transformers {version('transformers')} cannot read; expected "
            f"5.17 or later: pip install -U transformers"
        )


def refuse_unpacked(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Raise BadCheckpoint where bitsandbytes is stated and the weights are not packed: it would fail in the forward."""
    if _method(config) == "bitsandbytes" and not any(name.endswith(PACKED) for name in checkpoint.files):
        raise BadCheckpoint(
            f"config.json of {checkpoint.source.name} says bitsandbytes, and no tensor is packed so; for plain weights "
            "remove quantization_config from config.json"
        )


def refuse_packed_away(name: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModel where packed weights are offloaded: what accelerate loads of them has lost its scales."""
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta and is_packed(module, parameter):
                raise UnsupportedModel(f"{name} is quantized, and {path} would be offloaded; {NO_ROOM}")


NO_ROOM = "quantized layers have to fit: give it more memory, or take the unquantized model"
"""What to do about a quantized model that does not fit."""


def as_plain(checkpoint: Checkpoint, config: PretrainedConfig) -> Checkpoint:
    """The checkpoint as one of plain weights, where their format is undone here; a note says what was dequantized.

    Raises UnsupportedModel where a library for that is missing, BadCheckpoint where the weights are not as stated.
    """
    method = _method(config)
    if method is None:
        return checkpoint
    stated: Any = config.quantization_config
    form = format_of(checkpoint.source.name, method, stated if isinstance(stated, dict) else stated.to_dict())
    if form is None:
        if method in DEQUANTIZABLE:
            checkpoint.notes.append(f"weights were dequantized from {method}")
        return checkpoint
    plain = dequantized(checkpoint, form)
    plain.notes.append(f"{len(plain.packed)} weights were dequantized from {form.title}")
    return plain


def dequantizer(source: Source, config: PretrainedConfig) -> Any:
    """The transformers quantizer that dequantizes the checkpoint; None if it is not quantized, or undone by `as_plain`.

    Raises UnsupportedModel for a method that cannot be dequantized, or not by this transformers.
    """
    from transformers.quantizers.auto import get_hf_quantizer

    method = _method(config)
    if method is None or method in FORMATS:
        return None
    if method not in DEQUANTIZABLE:
        raise UnsupportedModel(
            f"{source.name} is quantized with {method}, which mwtool cannot dequantize (it can "
            f"{', '.join((*DEQUANTIZABLE, *FORMATS))}); scan the original model, whose massive rows are the same"
        )
    refuse_fp8_fault(source, config)
    if isinstance(config.quantization_config, dict):
        config.quantization_config["dequantize"] = True
    quantizer, _, _ = get_hf_quantizer(config, None, {"": "cpu"}, weights_only=True, user_agent={})
    return quantizer


def refuse_unscaled_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raises BadCheckpoint if a weight of a loaded model is stored packed, without a scale."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    names = tensor_map(model, list(checkpoint.files), [], [], get_model_conversion_mapping(model) or []).names
    weights = [name for name, _ in model.named_parameters()]  # buffers may be integers
    with checkpoint.tensors(name for weight in weights for name in names.get(weight, [])) as tensors:
        refuse_unscaled(tensors)


def refuse_unscaled(tensors: Mapping[str, Any]) -> None:
    """Raises BadCheckpoint for integers and 8-bit floats: without a scale, casting them would give wrong weights."""
    for name, tensor in tensors.items():
        stored = tensor.get_dtype() if hasattr(tensor, "get_dtype") else str(tensor.dtype).removeprefix("torch.")
        if stored.upper() not in PLAIN:
            raise BadCheckpoint(
                f"tensor {name} holds {stored}; expected floating point of 16 bits or more, since config.json has no "
                f"quantization_config"
            )
