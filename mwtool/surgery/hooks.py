"""Hooks that override the outputs of rows: to fix intermediate values, or where rows cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, WeightSlice
from mwtool.architecture.packed import bare_module, packed_dtype
from mwtool.architecture.reference import recompute
from mwtool.errors import UnsupportedModel
from mwtool.interrupts import restored


@dataclass(slots=True)
class Average:
    """Running mean of an intermediate state over tokens; for a routed expert, over the tokens routed to it.

    total: (I,), float64; count: tokens.
    """

    total: Tensor | None = None
    count: int = 0

    def add(self, z: Tensor) -> None:
        """Add the states of T tokens, (T, I)."""
        summed = z.detach().double().sum(0)
        self.total = summed if self.total is None else self.total + summed
        self.count += len(z)

    @property
    def values(self) -> Tensor | None:
        """The mean, (I,), float64; None before any token was added."""
        return None if self.total is None or not self.count else self.total / self.count


@restored
def averaging(model: nn.Module, ffn: FFN) -> Iterator[Average]:
    """Average the intermediate state over every token the model is run on inside the block.

    A dense FFN's state is captured with a hook; a routed expert's is recomputed from its weights.
    Raises UnsupportedModel for routed experts whose weights cannot be read.
    """
    if ffn.hook is None:
        refuse_unreadable(model, ffn)
    average = Average()

    def at_down(_module: nn.Module, args: tuple[Any, ...]) -> None:
        average.add(args[0].reshape(-1, args[0].shape[-1]))  # (T, I)

    def at_experts(_module: nn.Module, args: tuple[Any, ...]) -> None:
        received = args[0][(args[1] == ffn.expert).any(-1)]  # (T', H)
        average.add(recompute(ffn, model, received)[0])

    path, hook = (ffn.hook, at_down) if ffn.hook is not None else (ffn.module, at_experts)
    with _removing(model.get_submodule(path).register_forward_pre_hook(hook)):
        yield average


def refuse_offloaded(model: nn.Module, ffn: FFN) -> None:
    """Raises UnsupportedModel if the FFN is offloaded by accelerate, which loads its weights when the layer runs."""
    if is_offloaded(model, ffn):
        raise _offloaded(ffn)


def _offloaded(ffn: FFN) -> UnsupportedModel:
    return UnsupportedModel(
        f"{ffn.module} is offloaded, so its rows cannot be edited; load the model without offloading this layer, "
        f"with more device memory or --device cpu"
    )


def is_offloaded(model: nn.Module, ffn: FFN) -> bool:
    """Whether accelerate loads its weights when it runs."""
    return any(place.read(model).is_meta for place in ffn.inputs)


@restored
def with_loaded_rows_scaled(
    model: nn.Module, ffn: FFN, places: Sequence[WeightSlice], rows: Sequence[int], factor: float
) -> Iterator[None]:
    """Scale rows of offloaded weights each time accelerate has loaded them; what it loads them from stays as it is.

    places: of the FFN, biases included. Under a PEFT adapter, the rows of the base layer are scaled; of one that is
    merged where they are loaded, those of the sum. Raises UnsupportedModel where no hook of accelerate loads them, and
    for quantized weights.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(place.param.rpartition(".")[0] for place in places):
            inside = [place for place in places if place.param.rpartition(".")[0] == path]
            hook = getattr(bare_module(model, path), "_hf_hook", None)
            if hook is None:
                raise _offloaded(ffn)
            if any(packed_dtype(model, place) for place in inside):
                raise UnsupportedModel(
                    f"{ffn.module} is quantized and offloaded, so its rows cannot be edited; load the model without "
                    f"offloading this layer, or unquantized"
                )
            before = hook.pre_forward
            hook.pre_forward = _then_scaled(before, model, inside, list(rows), factor)
            stack.callback(setattr, hook, "pre_forward", before)
        stack.enter_context(without_nan(model, ffn, rows))
        yield


def _then_scaled(
    load: Callable[..., Any], model: nn.Module, places: Sequence[WeightSlice], rows: list[int], factor: float
) -> Callable[..., Any]:
    def pre_forward(module: nn.Module, *args: Any, **options: Any) -> Any:
        found = load(module, *args, **options)
        for name in {place.param for place in places}:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.clone()  # it may be the very tensor that it was loaded from
        with torch.no_grad():
            for place in places:
                view = place.read(model)
                view[rows] = view[rows] * factor if factor else torch.zeros_like(view[rows])
        return found

    return pre_forward


def refuse_unreadable(model: nn.Module, ffn: FFN) -> None:
    """Raises UnsupportedModel if the weights of routed experts, needed to compute their state, cannot be read."""
    refuse_offloaded(model, ffn)
    if any(packed_dtype(model, place) for place in (*ffn.inputs, ffn.down)):
        raise UnsupportedModel(
            f"{ffn.module} holds packed experts, whose values cannot be fixed at their mean; load the model unquantized"
        )


@restored
def with_state_fixed(model: nn.Module, ffn: FFN, rows: Sequence[int], means: Tensor) -> Iterator[None]:
    """Fix entries `rows` of the intermediate state, the input of ``W_down``, at their means.

    means: mean of every entry of the intermediate state, (I,).
    """
    assert ffn.hook is not None, "only routed experts have none"
    index, values = torch.tensor(rows), means[list(rows)]

    def fix(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state = args[0].clone()  # (..., I)
        state[..., index.to(state.device)] = values.to(state)
        return (state, *args[1:])

    with _removing(model.get_submodule(ffn.hook).register_forward_pre_hook(fix)):
        yield


@restored
def with_expert_output_added(model: nn.Module, ffn: FFN, rows: Sequence[int], means: Tensor) -> Iterator[None]:
    """Add ``W_down`` times the means of `rows`, weighted by the router, for tokens routed to this expert.

    The caller zeroes the rows themselves, so that this is their whole contribution.
    means: mean of every entry of the intermediate state, (I,).
    """
    down = ffn.down.read(model)  # (H, I)
    constant = down[:, list(rows)].double() @ means[list(rows)].to(down.device)  # (H,)

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        chosen, weights = args[1], args[2]  # (T, k)
        weight = (weights * (chosen == ffn.expert)).sum(-1, keepdim=True).double()  # (T, 1)
        fixed: Tensor = (output.double() + weight * constant).to(output.dtype)
        return fixed

    with _removing(model.get_submodule(ffn.module).register_forward_hook(add)):
        yield


@restored
def with_outputs_scaled(model: nn.Module, ffn: FFN, rows: Sequence[int], factor: float) -> Iterator[None]:
    """Scale the outputs of quantized up and gate modules at `rows`, biases included, by `factor`.

    Under a PEFT adapter, the output of the quantized base layer is scaled, which is what scaling its row would do.
    Raises UnsupportedModel for experts in one packed parameter, and for DoRA, whose norm reads the packed weight.
    """
    hooks = []
    for place in ffn.inputs:
        module: Any = owner(model, place)
        if getattr(module, "lora_magnitude_vector", None):
            raise UnsupportedModel(
                f"{ffn.module} is quantized under DoRA, whose norm reads the packed rows; load it unquantized"
            )
        layer: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if not isinstance(getattr(layer, "out_features", None), int):
            raise UnsupportedModel(
                f"{place.param} holds packed {place.read(model).dtype} weights and no module outputs its rows one by "
                f"one; load the model unquantized"
            )
        entries = place.rows(list(rows), (layer.out_features, layer.in_features))[1]
        hooks.append(layer.register_forward_hook(_times(factor, entries)))
    with _removing(*hooks):
        yield


@restored
def without_nan(model: nn.Module, ffn: FFN, rows: Sequence[int]) -> Iterator[None]:
    """Keep zeroed rows from giving 0/0 under DoRA, which divides each row by its norm: they output zero instead."""
    hooks = []
    for place in ffn.inputs:
        module: Any = owner(model, place)
        if getattr(module, "lora_magnitude_vector", None) and not module.merged:
            entries = place.rows(list(rows), tuple(module.get_base_layer().weight.shape))[1]
            found = partial(_without_norm, module, entries, transposed=place.transposed)
            if module.get_base_layer().weight.is_meta:  # known when it has been loaded; the hook that frees it is later
                hooks.append(module.register_forward_hook(_times(0.0, found), prepend=True))
            else:
                hooks.append(module.register_forward_hook(_times(0.0, found())))
    with _removing(*hooks):
        yield


def owner(model: nn.Module, place: WeightSlice) -> nn.Module:
    """The module that holds the parameter; under PEFT, the adapter layer that wraps it."""
    return model.get_submodule(place.param.rpartition(".")[0])


def _without_norm(module: Any, entries: list[int], *, transposed: bool) -> list[int]:
    """The output entries whose row of weight plus PEFT adapter is zero throughout."""
    weight = module.get_base_layer().weight
    whole = weight.T if transposed else weight  # (out, in)
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            whole = whole + module.scaling[adapter] * (module.lora_B[adapter].weight @ module.lora_A[adapter].weight)
    return [entry for entry in entries if not whole[entry].any()]


def _times(factor: float, entries: list[int] | Callable[[], list[int]]) -> Callable[..., Tensor]:
    """A hook that scales outputs. entries: which ones, or what says so at each forward."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        scaled, at = output.clone(), entries if isinstance(entries, list) else entries()
        # assigned, not multiplied: zero times NaN is NaN
        scaled[..., at] = scaled[..., at] * factor if factor else 0.0
        return scaled

    return hook


@restored
def _removing(*handles: Any) -> Iterator[None]:
    """Remove the hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
