"""Whether a weight is stored plainly, as the architecture adapter describes it, or packed by quantization."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import WeightSlice

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Weights of any other dtype are packed, or scaled by a factor stored elsewhere."""


def is_packed(layer: nn.Module, weight: Tensor) -> bool:
    """Whether `weight`, a parameter of `layer` of shape (out, in) or (out,), is packed.

    Decided by its type, its dtype, and a size other than the layer's: for FSDP, 4-bit weights are stored as floats,
    so the dtype alone is not enough.
    """
    plain = type(weight) in {Tensor, nn.Parameter} or _is_sharded(weight)
    if not plain or weight.dtype not in PLAIN:
        return True
    out, into = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if weight.ndim == 1 or not isinstance(out, int) or not isinstance(into, int):  # a bias is never packed
        return False
    return weight.numel() != out * into


def _is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor. If none was made, the module is not imported, which would take a third of a second."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(weight) is module.DTensor


def packed_dtype(model: nn.Module, place: WeightSlice) -> str | None:
    """The dtype in which the parameter at `place` is packed, such as ``uint8``; None if it is not packed."""
    path, _, name = place.param.rpartition(".")
    module = bare_module(model, path)  # PEFT's layers have in_features and out_features of their own
    weight: Tensor = getattr(module, name)
    return str(weight.dtype).removeprefix("torch.") if is_packed(module, weight) else None


def bare_module(model: nn.Module, path: str) -> Any:
    """The module at `path` without the PEFT layers that wrap it."""
    module: Any = model.get_submodule(path)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
