"""Whether a weight's entries are stored as they act and where the adapter says, or packed by quantization."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import WeightSlice

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Other types are packed, or scaled by a factor kept elsewhere."""


def is_packed(layer: nn.Module, weight: Tensor) -> bool:
    """Whether this parameter of `layer` is packed: by its type, its dtype, or a size other than the layer's.

    4 bit may be stored as floats, which FSDP needs: the dtype alone does not show it.
    """
    plain = type(weight) in {Tensor, nn.Parameter} or _is_sharded(weight)
    if not plain or weight.dtype not in PLAIN:
        return True
    out, into = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if weight.ndim == 1 or not isinstance(out, int) or not isinstance(into, int):  # a bias is never packed
        return False
    return weight.numel() != out * into


def _is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor. Where none was made its module is not loaded, which would take a third of a second."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(weight) is module.DTensor


def packed_dtype(model: nn.Module, place: WeightSlice) -> str | None:
    """What the parameter at `place` is packed in, such as ``uint8``; None where it is not packed."""
    path, _, name = place.param.rpartition(".")
    module = bare_module(model, path)  # PEFT's layers have sizes of their own
    weight: Tensor = getattr(module, name)
    return str(weight.dtype).removeprefix("torch.") if is_packed(module, weight) else None


def bare_module(model: nn.Module, path: str) -> Any:
    """The module at `path`, out of the layers PEFT has put around it."""
    module: Any = model.get_submodule(path)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
