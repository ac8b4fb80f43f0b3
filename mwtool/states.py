"""What a forward of bos leaves behind in each decoder layer, captured with hooks as it runs.

The walk works on any transformers model, whole in memory or streamed from disk, and can
stop between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.errors import BadCheckpoint, BadPlugin, UnsupportedModel
from mwtool.layout import FFN, DecoderLayer

SUPER_WEIGHT_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class SuperWeight:
    """``down_proj[hidden_dim, ffn_index]``, an entry through which a spike passes (Yu et al. 2024)."""

    layer: int
    hidden_dim: int
    ffn_index: int
    value: float


@dataclass(frozen=True, slots=True)
class LayerState:
    """One decoder layer at the first position, in float64 on the CPU.

    hidden: the residual stream after the layer, (H,).
    intermediate: the input of ``W_down``, (I,).
    added: what the FFN adds to the residual stream, (H,).
    """

    layer: int
    hidden: Tensor
    intermediate: Tensor
    added: Tensor
    super_weights: tuple[SuperWeight, ...] = ()


class _Stop(Exception):
    """Ends a forward between two layers."""


def walk(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    token: int,
    *,
    spike: float,
    enough: Callable[[Sequence[LayerState]], bool],
    on_layer: Callable[[LayerState], None] | None = None,
) -> list[LayerState]:
    """Run `token` alone at the first position and keep each layer's state until `enough` says so.

    spike: what an input and an output of ``down_proj`` must exceed to look for super weights.
    Raises BadCheckpoint where the residual stream is not finite.
    """
    states: list[LayerState] = []

    def seen(state: LayerState) -> None:
        states.append(state)
        if on_layer is not None:
            on_layer(state)
        if enough(states) or len(states) == len(layers):  # the head is never needed
            raise _Stop

    with _capturing(model, layers, spike, seen), torch.no_grad():
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        with suppress(_Stop):
            model(input_ids=torch.tensor([[token]], device=device), use_cache=False)
    return states


@contextmanager
def _capturing(
    model: nn.Module, layers: Sequence[DecoderLayer], spike: float, seen: Callable[[LayerState], None]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for index, layer in enumerate(layers):
            handles.extend(_hooks(model, index, layer, spike, seen))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    model: nn.Module, index: int, layer: DecoderLayer, spike: float, seen: Callable[[LayerState], None]
) -> list[Any]:
    ffn = dense(layer)
    assert ffn.hook is not None
    caught: dict[str, Tensor] = {}

    def at_down(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        caught["intermediate"], caught["down"] = first(args[0]), first(output)

    def at_added(_module: nn.Module, _args: Any, output: Any) -> None:
        caught["added"] = first(output)

    def at_layer(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = first(output)
        if not hidden.isfinite().all():
            raise BadCheckpoint(
                f"the residual stream after layer {index} is not finite although its weights are; "
                f"float16 overflows above 65,504: try --dtype bfloat16 or float32"
            )
        supers = super_weights(index, ffn.down.read(model), caught["intermediate"], caught["down"], spike)
        seen(LayerState(index, hidden, caught["intermediate"], caught["added"], supers))

    places = ((ffn.hook, at_down), (layer.adds, at_added), (layer.path, at_layer))
    # Before any hook that is there already: a streamed layer drops its weights in one.
    return [submodule(model, path).register_forward_hook(hook, prepend=True) for path, hook in places]


def dense(layer: DecoderLayer) -> FFN:
    """The layer's only FFN; raises UnsupportedModel where there are several."""
    if len(layer.ffns) != 1 or layer.ffns[0].hook is None:
        raise UnsupportedModel(
            f"{layer.path} has {len(layer.ffns)} feed-forward networks; only dense layers are scanned"
        )
    return layer.ffns[0]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule`, blaming the adapter where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as fault:
        raise BadPlugin(f"the adapter names module {path}, which {type(model).__name__} does not have") from fault


def first(output: Any) -> Tensor:
    """The first position's vector of a module's output, in float64 on the CPU.

    Decoder layers return a tensor or a tuple that begins with one, shaped (1, 1, width) or (1, width).
    """
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.detach().reshape(-1, tensor.shape[-1])[0].to("cpu", torch.float64, copy=True)


def super_weights(layer: int, down: Tensor, z: Tensor, output: Tensor, spike: float) -> tuple[SuperWeight, ...]:
    """Super weights of one layer: where |z| and |down z| both exceed `spike` at their largest.

    The coordinate is (argmax of the output, argmax of the input); the weight is then taken
    out of the output and the search repeated, at most 10 rounds (Yu et al. 2024).

    down: (H, I); z: (I,); output: (H,).
    """
    found: list[SuperWeight] = []
    output, index = output.clone(), int(z.abs().argmax())
    while abs(float(z[index])) > spike and len(found) < SUPER_WEIGHT_ROUNDS:
        dim = int(output.abs().argmax())
        if abs(float(output[dim])) <= spike or any(s.hidden_dim == dim for s in found):
            break
        value = float(down[dim, index])
        found.append(SuperWeight(layer, dim, index, value))
        output[dim] -= value * z[index]
    return tuple(found)
