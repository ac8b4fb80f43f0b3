"""What rows give, overridden by hooks: where it is the intermediate value that is fixed, or rows cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, WeightSlice
from mwtool.architecture.packed import packed_dtype
from mwtool.architecture.reference import recompute
from mwtool.errors import UnsupportedModel


@dataclass(slots=True)
class Average:
    """Running mean of an intermediate state over tokens; a routed expert's is over the tokens it received.

    total: (I,), float64; count: tokens.
    """

    total: Tensor | None = None
    count: int = 0

    def take(self, z: Tensor) -> None:
        """Add states, (T, I)."""
        summed = z.detach().double().sum(0)
        self.total = summed if self.total is None else self.total + summed
        self.count += len(z)

    @property
    def values(self) -> Tensor | None:
        """(I,); None where no token came by."""
        return None if self.total is None or not self.count else self.total / self.count


@contextmanager
def averaging(model: nn.Module, ffn: FFN) -> Iterator[Average]:
    """Gathers the mean intermediate state over every token the model is run on inside the block.

    Raises UnsupportedModel for routed experts whose weights cannot be read; a dense network's state is seen as it is.
    """
    if ffn.hook is None:
        refuse_unreadable(model, ffn)
    average = Average()

    def at_down(_module: nn.Module, args: tuple[Any, ...]) -> None:
        average.take(args[0].reshape(-1, args[0].shape[-1]))

    def at_experts(_module: nn.Module, args: tuple[Any, ...]) -> None:
        received = args[0][(args[1] == ffn.expert).any(-1)]  # (T', H)
        average.take(recompute(ffn, model, received)[0])

    path, hook = (ffn.hook, at_down) if ffn.hook is not None else (ffn.module, at_experts)
    with _removed(model.get_submodule(path).register_forward_pre_hook(hook)):
        yield average


def refuse_offloaded(model: nn.Module, ffn: FFN) -> None:
    """Raise UnsupportedModel where the rows are on the disk, or on another device until the layer runs."""
    if any(place.read(model).is_meta for place in ffn.inputs):
        raise UnsupportedModel(
            f"{ffn.module} is offloaded and its rows cannot be edited; load the model without offloading this layer, "
            f"with more device memory or --device cpu"
        )


def refuse_unreadable(model: nn.Module, ffn: FFN) -> None:
    """Raise UnsupportedModel where experts' weights are elsewhere or packed: their state is computed from these."""
    refuse_offloaded(model, ffn)
    if any(packed_dtype(model, place) for place in (*ffn.inputs, ffn.down)):
        raise UnsupportedModel(f"{ffn.module} holds packed experts, whose values cannot be fixed at their mean")


@contextmanager
def state_with(model: nn.Module, ffn: FFN, rows: Sequence[int], means: Tensor) -> Iterator[None]:
    """Entries `rows` of the intermediate state, what ``W_down`` receives, have their means' values."""
    assert ffn.hook is not None, "only routed experts have none"
    index, values = torch.tensor(rows), means[list(rows)]

    def fix(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state = args[0].clone()  # (..., I)
        state[..., index.to(state.device)] = values.to(state)
        return (state, *args[1:])

    with _removed(model.get_submodule(ffn.hook).register_forward_pre_hook(fix)):
        yield


@contextmanager
def expert_output_with(model: nn.Module, ffn: FFN, rows: Sequence[int], means: Tensor) -> Iterator[None]:
    """Adds what the means of `rows` give through ``W_down``, weighted by the router, where tokens go to this expert.

    The rows themselves are to be zeroed: an entry of the intermediate state is then zero, and this its only part.
    """
    down = ffn.down.read(model)  # (H, I)
    constant = down[:, list(rows)].double() @ means[list(rows)].to(down.device)  # (H,)

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        chosen, weights = args[1], args[2]  # (T, k)
        weight = (weights * (chosen == ffn.expert)).sum(-1, keepdim=True).double()  # (T, 1)
        fixed: Tensor = (output.double() + weight * constant).to(output.dtype)
        return fixed

    with _removed(model.get_submodule(ffn.module).register_forward_hook(add)):
        yield


@contextmanager
def with_outputs_scaled(model: nn.Module, ffn: FFN, rows: Sequence[int], factor: float) -> Iterator[None]:
    """Outputs of quantized up and gate modules at `rows`, biases included, times `factor`.

    Under an adapter it is the quantized layer's own output that is scaled, as the row itself would be.
    Raises UnsupportedModel for experts in one packed parameter, and for DoRA, whose norm reads the packed weight.
    """
    hooks = []
    for place in ffn.inputs:
        module: Any = owner(model, place)
        if getattr(module, "lora_magnitude_vector", None):
            raise UnsupportedModel(
                f"{ffn.module} is quantized under DoRA, whose norm reads packed rows; load it unquantized"
            )
        layer: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if not isinstance(getattr(layer, "out_features", None), int):
            raise UnsupportedModel(
                f"{place.param} holds packed {place.read(model).dtype} weights and no module gives its rows' outputs; "
                f"load the model unquantized"
            )
        entries = place.rows(list(rows), (layer.out_features, layer.in_features))[1]
        hooks.append(layer.register_forward_hook(_times(factor, entries)))
    with _removed(*hooks):
        yield


@contextmanager
def without_nan(model: nn.Module, ffn: FFN, rows: Sequence[int]) -> Iterator[None]:
    """DoRA divides a row by its norm: one that is zero, adapter included, gives zero inside the block, not 0/0."""
    hooks = []
    for place in ffn.inputs:
        module: Any = owner(model, place)
        if getattr(module, "lora_magnitude_vector", None):
            entries = place.rows(list(rows), tuple(module.get_base_layer().weight.shape))[1]
            empty = _without_norm(module, entries, transposed=place.transposed)
            hooks.append(module.register_forward_hook(_times(0.0, empty)))
    with _removed(*hooks):
        yield


def owner(model: nn.Module, place: WeightSlice) -> nn.Module:
    """The module that holds the parameter; under PEFT the adapter's layer around it."""
    return model.get_submodule(place.param.rpartition(".")[0])


def _without_norm(module: Any, entries: list[int], *, transposed: bool) -> list[int]:
    """Those of the output entries whose row of weight plus adapter is zero throughout."""
    weight = module.get_base_layer().weight
    whole = weight.T if transposed else weight  # (out, in)
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            whole = whole + module.scaling[adapter] * (module.lora_B[adapter].weight @ module.lora_A[adapter].weight)
    return [entry for entry in entries if not whole[entry].any()]


def _times(factor: float, entries: list[int]) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        scaled = output.clone()
        # assigned, not multiplied: zero times NaN is NaN
        scaled[..., entries] = scaled[..., entries] * factor if factor else 0.0
        return scaled

    return hook


@contextmanager
def _removed(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
