"""Every option with which a whole model is opened, with its default. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precisions a model can be computed in; `auto` is the one its checkpoint is stored in."""
On = Literal["base", "merged"]
"""Where attacks act on a PEFT adapter folder's model: on the base model below the adapter, or on the sum of both."""
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How accelerate distributes a model over the devices."""
Download = Literal["auto", "whole", "ranges"]
"""What a scan fetches from the Hub: files that are not in the cache by ranges where they can be, or files whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to open a model. The fields are the keyword arguments of `load`."""

    on: On = "base"
    revision: str | None = None
    dtype: DType = "auto"
    device: str = "cpu"
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
