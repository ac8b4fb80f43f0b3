"""A model that computes with quantized weights although it keeps its own: one module's weights at a time.

A hook replaces a module's weights by their quantized values just before the module runs, and puts the original
storage back just after. So there is one model in memory, plus the module at work, and the weights are never written
to: what is put back is the same storage, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mwtool.architecture.layout import DecoderLayer, WeightSlice
from mwtool.architecture.packed import is_packed
from mwtool.errors import UnsupportedModel
from mwtool.interrupts import restored
from mwtool.quantization.rounding import Scheme, round_to_nearest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """The weights of one module that are quantized: parameter -> its matrices, each read as (out, in)."""

    path: str
    parameters: Mapping[str, Sequence[WeightSlice]]


def linear_weights(model: nn.Module, layers: Sequence[DecoderLayer]) -> tuple[Linear, ...]:
    """Every matrix of the decoder layers, attention and FFN, experts included; embeddings and the head are not.

    Raises UnsupportedModel where weights are quantized already, or offloaded.
    """
    found: dict[str, dict[str, list[WeightSlice]]] = {}
    for layer in layers:
        named = [place for ffn in layer.ffns for place in (*ffn.inputs, ffn.down)]
        for path, module in model.get_submodule(layer.path).named_modules(prefix=layer.path):
            if _is_linear(module) and not any(one.param == f"{path}.weight" for one in named):
                named.append(WeightSlice(f"{path}.weight", transposed=not isinstance(module, nn.Linear)))
        for place in named:
            path, _, name = place.param.rpartition(".")
            found.setdefault(path, {}).setdefault(name, []).append(place)
    for path, parameters in found.items():
        for name in parameters:
            _refuse(model, path, name)
    return tuple(Linear(path, parameters) for path, parameters in found.items())


def _is_linear(module: nn.Module) -> bool:
    """torch's, and transformers' Conv1D, which GPT-2 stores its matrices in."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _refuse(model: nn.Module, path: str, name: str) -> None:
    module = model.get_submodule(path)
    weight: Tensor = getattr(module, name)
    if weight.is_meta:
        raise UnsupportedModel(f"{path}.{name} is offloaded; quantizing it in memory needs more memory or --device cpu")
    if is_packed(module, weight):
        raise UnsupportedModel(
            f"{path}.{name} is quantized already ({str(weight.dtype).removeprefix('torch.')}); give the model it was "
            f"made from"
        )


@restored
def quantized(
    model: nn.Module, weights: Sequence[Linear], scheme: Scheme, masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """The model computing with quantized weights inside the block; its own are untouched.

    masks: parameter name -> entries that stay, bool, of the parameter's shape: (out, in), or (E, out, in) for experts.
    """
    swaps = [_Swap(module=model.get_submodule(one.path), linear=one, scheme=scheme, masks=masks) for one in weights]
    handles: list[Any] = []
    try:
        for swap in swaps:
            handles.append(swap.module.register_forward_pre_hook(swap.enter))
            handles.append(swap.module.register_forward_hook(swap.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for swap in swaps:
            swap.restore()


@dataclass(slots=True, kw_only=True)
class _Swap:
    """The hooks of one module."""

    module: nn.Module
    linear: Linear
    scheme: Scheme
    masks: Mapping[str, Tensor]
    originals: dict[str, Tensor] = field(default_factory=dict)
    kept_whole: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        masks = {name: self.masks.get(f"{self.linear.path}.{name}") for name in self.linear.parameters}
        self.kept_whole = frozenset(name for name, mask in masks.items() if mask is not None and bool(mask.all()))

    def enter(self, _module: nn.Module, _args: Any) -> None:
        for name, places in self.linear.parameters.items():
            if name not in self.kept_whole:
                parameter: Any = getattr(self.module, name)
                self.originals[name] = parameter.data
                mask = self.masks.get(f"{self.linear.path}.{name}")
                parameter.data = _quantized(parameter.data, places, self.scheme, mask)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the module its own storage back; does nothing where it has it."""
        for name, original in self.originals.items():
            parameter: Any = getattr(self.module, name)
            parameter.data = original
        self.originals.clear()


def _quantized(weight: Tensor, places: Sequence[WeightSlice], scheme: Scheme, mask: Tensor | None) -> Tensor:
    """A copy of the parameter with each of its matrices rounded."""
    found = torch.empty_like(weight) if len(places) == 1 and not places[0].index else weight.clone()
    for place in places:
        source, target = weight[place.index], found[place.index]
        kept = None if mask is None else mask[place.index]
        if place.transposed:
            source, target, kept = source.T, target.T, None if kept is None else kept.T
        target.copy_(round_to_nearest(source, scheme, kept))
    return found
