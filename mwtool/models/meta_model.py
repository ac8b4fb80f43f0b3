"""Meta models: models without weights, built from a configuration, with the settings for loading their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.errors import BadCheckpoint
from mwtool.models.checkpoint import Checkpoint
from mwtool.models.quantization import dequantizer
from mwtool.models.source import Source, model_class, unusable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class MetaModel:
    """A model without weights, ready to run once it has them.

    parameters: number of parameters, tied ones counted once. load_config: transformers' settings for loading weights.
    """

    model: PreTrainedModel
    parameters: int
    load_config: Any


def empty_model(source: Source, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The model's modules with parameters and buffers on the meta device.

    config: the model's configuration if it has been read already.
    Raises BadCheckpoint if no model can be built from it.
    """
    config = source.config() if config is None else config
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), _building(source):
        made: PreTrainedModel = model_class(config).from_config(config, trust_remote_code=source.trust_remote_code)
    made.tie_weights()  # not done without initial values, and a tied head would be counted as one of its own
    return made


def build(
    source: Source,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    *,
    check: Callable[[PreTrainedModel], None] | None = None,
) -> MetaModel:
    """A model that can run once it has weights: its buffers (rotary frequencies) are computed and on the device.

    check: called with the model before a quantizer replaces modules.
    Raises UnsupportedModel for a quantization that cannot be undone, BadCheckpoint where no model can be built.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    torch_dtype = resolved_dtype(dtype, config, checkpoint)
    quantizer = dequantizer(source, config)
    model = _built(source, config, torch_dtype)
    parameters = model.num_parameters()
    if check is not None:
        check(model)
    if quantizer is not None:
        with _without_weights():
            quantizer.preprocess_model(model=model, dtype=torch_dtype, device_map={"": device}, checkpoint_files=None)
    model.eval().requires_grad_(requires_grad=False)
    for name, buffer in model.named_buffers():
        _set_buffer(model, name, buffer.to(device))
    mapping: Any = get_model_conversion_mapping(model, None, quantizer)
    load_config = LoadStateDictConfig(
        device_map={"": device},
        dtype=torch_dtype,
        dtype_plan=model._get_dtype_plan(torch_dtype),  # noqa: SLF001 - the only way to the fp32 exceptions of a model class
        hf_quantizer=quantizer,
        weight_mapping=mapping,
    )
    return MetaModel(model, parameters, load_config)


def _built(source: Source, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with _building(source), _without_weights():
        model: PreTrainedModel = model_class(config).from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    model.tie_weights()  # not inside the block, which gives every module a parameter of its own
    return model


@contextmanager
def _building(source: Source) -> Iterator[None]:
    """What a model's constructor raises or asserts over its configuration, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)  # refused by its shape
            yield
    except unusable() as fault:
        line = " ".join(f"{type(fault).__name__} {fault}".split())
        raise BadCheckpoint(f"a model cannot be built from {source.folder / 'config.json'}: {line}") from fault


def resolved_dtype(dtype: str, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype; `auto` is as in `from_pretrained`: that of the configuration, else that of the stored weights."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    stated = config.dtype or config.get_text_config().dtype
    if isinstance(stated, torch.dtype):
        return stated
    for name in checkpoint.files:
        with checkpoint.tensors([name]) as tensors:
            tensor = tensors[name]
            scalar = not (tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
            stored: torch.dtype = (tensor[...] if scalar else tensor[:1]).dtype
        if stored.is_floating_point and stored.itemsize > 1:
            return stored
    return torch.float32


@contextmanager
def _without_weights() -> Iterator[None]:
    """Build modules with parameters on the meta device, but buffers (rotary frequencies) with their values."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._buffers[leaf] = value  # noqa: SLF001 - keeps it non-persistent, as register_buffer would not
