"""The types with which an adapter describes where one architecture keeps the matrices of its FFNs.

Scan, ablation and MacDrop all need to know which entries of which parameter form row i of
``W_up`` and ``W_gate``. Architectures store these matrices plain, fused, transposed or stacked
over experts. A `WeightSlice` names the place and reads it as a writable view, so that the same
code works for all of them.

Nothing here imports torch or transformers, so that adapters are cheap to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from mwtool.errors import UnsupportedModel as UnsupportedModel  # re-exported: adapters import this module alone

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

Index = tuple[int | slice, ...]
"""Basic indexing only (integers and slices), so that reading gives a view and not a copy."""


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Part of one parameter, read as ``(out_features, in_features)``, or ``(out_features,)`` for a bias.

    param: name in ``model.named_parameters()`` before PEFT wraps the model and adds ``.base_layer``.
    index: basic index into the parameter; ``()`` is the whole parameter.
    transposed: whether it is stored as (in, out), as in GPT-2's Conv1D.
    """

    param: str
    index: Index = field(default=(), hash=False)  # slices have no hash before Python 3.12
    transposed: bool = False

    def read(self, model: nn.Module) -> Tensor:
        """A view of the parameter's storage, (out, in) or (out,) for a bias; writing to it changes the model.

        Read through the module's attribute, which PEFT's layers forward to the base layer.
        Raises AttributeError or IndexError if the parameter or the index does not exist.
        """
        path, _, name = self.param.rpartition(".")
        module: Any = model.get_submodule(path)
        while not hasattr(module, name):  # PEFT's wrapper around expert parameters does not forward them
            module = module.base_layer
        weight: Tensor = getattr(module, name).data
        view = weight[self.index]
        return view.T if self.transposed else view

    def rows(self, rows: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Where output rows are in a parameter of this shape: the dimension, and the indices along it."""
        return self._along(-2 if not self.transposed else -1, rows, shape)

    def columns(self, columns: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Where input columns are in a parameter of this shape: the dimension, and the indices along it."""
        return self._along(-1 if not self.transposed else -2, columns, shape)

    def _along(self, axis: int, entries: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        # Each integer in the index removes a dimension; the remaining ones are the view's axes, in order.
        index = (*self.index, *[slice(None)] * (len(shape) - len(self.index)))
        kept = [(dim, part) for dim, part in enumerate(index) if isinstance(part, slice)]
        dim, part = kept[axis]
        places = range(*part.indices(shape[dim]))
        return dim, [places[entry] for entry in entries]


@dataclass(frozen=True, slots=True)
class FFN:
    """One feed-forward network: a dense MLP, one routed expert, or a shared expert.

    It computes ``down(act(gate x) * up x)``, or ``down(act(up x))`` if there is no gate.

    up, gate: read as (I, H), the biases as (I,); down: (H, I), its bias (H,).
    act: the activation's name in ``transformers.activations.ACT2FN``.
    expert: index among the layer's routed experts; None for a dense MLP or a shared expert.
    hook: the module that applies `down`: its input is the intermediate state, (..., I); None for fused experts.
    combine: function of ``(gate x, up x)`` that gives the intermediate state, if it is not ``act(gate x) * up x``.
    """

    up: WeightSlice
    down: WeightSlice
    gate: WeightSlice | None = None
    act: str = "silu"
    up_bias: WeightSlice | None = None
    gate_bias: WeightSlice | None = None
    down_bias: WeightSlice | None = None
    expert: int | None = None
    hook: str | None = None
    combine: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def module(self) -> str:
        """The innermost module that holds both `up` and `down`, such as ``model.layers.1.mlp``."""
        parts = self.up.param.split("."), self.down.param.split(".")
        return ".".join(os.path.commonprefix(parts))  # noqa: RUF071 - given lists, it compares whole elements

    @property
    def inputs(self) -> tuple[WeightSlice, ...]:
        """The matrices whose row i produces intermediate entry i: up, then gate if there is one."""
        return (self.up,) if self.gate is None else (self.up, self.gate)

    def width(self, model: nn.Module) -> int:
        """I, the width of the intermediate state. Read from the module where there is one: packed weights hide it."""
        module = None if self.hook is None else model.get_submodule(self.hook)
        stated = getattr(module, "in_features", None)
        return stated if isinstance(stated, int) else self.up.read(model).shape[0]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer.

    module: called as ``(hidden_states, top_k_index, top_k_weights)``, shapes (T, H), (T, k), (T, k); returns the
        weighted sum of the chosen experts. The first dimension of its parameters is the expert. Its parent module
        adds the shared expert, if there is one.
    router: module whose output is, or begins with, the logits over all experts, (T, E).
    scores: the function that turns logits into probabilities.
    proportional: whether the weights of the chosen experts are proportional to their probabilities, as in every
        supported type but phimoe.
    """

    module: str
    router: str
    scores: Literal["softmax", "sigmoid"] = "softmax"
    proportional: bool = True

    @property
    def block(self) -> str:
        """The module whose output is the sum of routed and shared experts."""
        return self.module.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer.

    path: the module whose output is, or begins with, the residual stream after this layer.
    ffns: its FFNs: one in a dense layer; else the routed experts in order, followed by at most one shared expert.
    adds: the module whose output is added to the residual stream as the contribution of the FFN: the MLP itself, the
        norm after it (gemma2, olmo2), or its last matrix if the MLP itself adds the residual (bloom).
    scale: the factor by which that output is multiplied before it is added (granite).
    experts: the module and the router of the routed experts; None in a dense layer.
    """

    path: str
    ffns: tuple[FFN, ...]
    adds: str
    scale: float = 1.0
    experts: Experts | None = None


@runtime_checkable
class Adapter(Protocol):
    """What a plugin registers for a model type in the entry-point group ``mwtool.adapters``."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        """Describe decoder layer `index`, counted from 0, of a model with this configuration."""
        ...


def gated_mlp(mlp: str, act: str, *, bias: bool = False) -> FFN:
    """The most common FFN: ``gate_proj`` and ``up_proj``, (I, H), and ``down_proj``, (H, I), in module `mlp`."""
    ffn = plain_mlp(mlp, "up_proj", "down_proj", act, bias=bias)
    gate_bias = WeightSlice(f"{mlp}.gate_proj.bias") if bias else None
    return replace(ffn, gate=WeightSlice(f"{mlp}.gate_proj.weight"), gate_bias=gate_bias)


def plain_mlp(mlp: str, up: str, down: str, act: str, *, bias: bool = True, transposed: bool = False) -> FFN:
    """An FFN of two matrices without a gate: modules `up` and `down` in module `mlp`.

    transposed: whether the matrices are stored as (in, out), as in a Conv1D.
    """
    return FFN(
        up=WeightSlice(f"{mlp}.{up}.weight", transposed=transposed),
        down=WeightSlice(f"{mlp}.{down}.weight", transposed=transposed),
        act=act,
        up_bias=WeightSlice(f"{mlp}.{up}.bias") if bias else None,
        down_bias=WeightSlice(f"{mlp}.{down}.bias") if bias else None,
        hook=f"{mlp}.{down}",
    )


def fused_mlp(mlp: str, width: int, act: str) -> FFN:
    """Gate and up in one ``gate_up_proj``, (2I, H): rows 0 to I-1 are the gate, rows I to 2I-1 up. `width` is I."""
    return FFN(
        up=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width, None),)),
        gate=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width),)),
        down=WeightSlice(f"{mlp}.down_proj.weight"),
        act=act,
        hook=f"{mlp}.down_proj",
    )


def fused_experts(experts: str, count: int, width: int, act: str) -> tuple[FFN, ...]:
    """E routed experts in two parameters: ``gate_up_proj``, (E, 2I, H), gate first, and ``down_proj``, (E, H, I)."""
    return tuple(
        FFN(
            up=WeightSlice(f"{experts}.gate_up_proj", (expert, slice(width, None))),
            gate=WeightSlice(f"{experts}.gate_up_proj", (expert, slice(width))),
            down=WeightSlice(f"{experts}.down_proj", (expert,)),
            act=act,
            expert=expert,
        )
        for expert in range(count)
    )
