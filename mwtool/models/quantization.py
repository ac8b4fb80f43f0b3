"""How a checkpoint's weights are packed: by a method that is undone, by one that is not, or by nobody knows what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models.checkpoint import Checkpoint
from mwtool.models.key_mapping import tensor_map
from mwtool.models.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEQUANTIZABLE = ("fp8", "mxfp4")
"""Quantization methods whose checkpoints transformers turns back into plain weights on any device."""
PLAIN = ("F16", "BF16", "F32", "F64", "FLOAT16", "BFLOAT16", "FLOAT32", "FLOAT64")
"""Types of weights that are what they say, as safetensors names them, then as torch does."""


def dequantizable(config: PretrainedConfig) -> bool:
    """Whether a checkpoint of this configuration is quantized by a method that is undone."""
    return _method(config) in DEQUANTIZABLE


def _method(config: PretrainedConfig) -> str | None:
    """How the checkpoint is quantized; None if it is not."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    return str(stated.get("quant_method", "unknown") if isinstance(stated, dict) else stated.quant_method)


def dequantizer(source: Source, config: PretrainedConfig) -> Any:
    """The quantizer that turns a checkpoint's packed weights back into plain ones; None if it is not quantized."""
    from transformers.quantizers.auto import get_hf_quantizer

    method = _method(config)
    if method is None:
        return None
    if method not in DEQUANTIZABLE:
        raise UnsupportedModel(
            f"{source.name} is quantized with {method}, which mwtool does not undo (it undoes "
            f"{' and '.join(DEQUANTIZABLE)}); scan the model it was made from: the rows are the same"
        )
    if isinstance(config.quantization_config, dict):
        config.quantization_config["dequantize"] = True
    quantizer, _, _ = get_hf_quantizer(config, None, {"": "cpu"}, weights_only=True, user_agent={})
    return quantizer


def refuse_unscaled_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise BadCheckpoint where a weight of a model loaded whole is stored packed and nothing says how."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    names = tensor_map(model, list(checkpoint.files), [], [], get_model_conversion_mapping(model) or []).names
    weights = [name for name, _ in model.named_parameters()]  # whole numbers may well be buffers
    with checkpoint.tensors(name for weight in weights for name in names.get(weight, [])) as tensors:
        refuse_unscaled(tensors)


def refuse_unscaled(tensors: Mapping[str, Any]) -> None:
    """Whole numbers and 8 bits of floating point are no weights without a scale; cast, they would pass for some."""
    for name, tensor in tensors.items():
        stored = tensor.get_dtype() if hasattr(tensor, "get_dtype") else str(tensor.dtype).removeprefix("torch.")
        if stored.upper() not in PLAIN:
            raise BadCheckpoint(
                f"tensor {name} holds {stored}; expected floating point of 16 bits or more, as config.json states no "
                f"quantization_config"
            )
