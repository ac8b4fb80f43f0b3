"""Where a feed-forward network's matrices live: what an adapter says about one architecture.

Everything mwtool does (scan, ablation, MacDrop) needs to know which entries of which
parameter form row i of ``W_up`` and ``W_gate``. Architectures store them plain, fused,
transposed or stacked over experts; a `WeightSlice` names the place and reads it as a
writable view, so that the same code serves them all.

Nothing here imports torch or transformers: adapters stay cheap to import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

Index = tuple[int | slice, ...]
"""Basic indexing only (integers and slices), so that reading gives a view, never a copy."""


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Part of one parameter, read as ``(out_features, in_features)``, or ``(out_features,)`` for a bias.

    param: name in ``model.named_parameters()`` before any wrapping (PEFT adds ``.base_layer``).
    index: basic index into the parameter; ``()`` is all of it.
    transposed: stored as (in, out), as GPT-2's Conv1D does.
    """

    param: str
    index: Index = ()
    transposed: bool = False

    def read(self, model: nn.Module) -> Tensor:
        """A view on the parameter's storage: writing to it changes the model.

        Goes through the module's attribute, which PEFT's layers forward to the base layer.
        Raises AttributeError or IndexError where the parameter or the place does not exist.
        """
        module, _, name = self.param.rpartition(".")
        weight: Tensor = getattr(model.get_submodule(module), name).data
        view = weight[self.index]
        return view.T if self.transposed else view

    def rows(self, rows: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Where output rows lie in a parameter of this shape: its dimension, and the indices along it."""
        return self._along(-2 if not self.transposed else -1, rows, shape)

    def columns(self, columns: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Where input columns lie in a parameter of this shape, as `rows`."""
        return self._along(-1 if not self.transposed else -2, columns, shape)

    def _along(self, axis: int, entries: list[int], shape: tuple[int, ...]) -> tuple[int, list[int]]:
        # Each integer in the index takes a dimension away; what remains are the view's axes, in order.
        index = (*self.index, *[slice(None)] * (len(shape) - len(self.index)))
        kept = [(dim, part) for dim, part in enumerate(index) if isinstance(part, slice)]
        dim, part = kept[axis]
        places = range(*part.indices(shape[dim]))
        return dim, [places[entry] for entry in entries]


@dataclass(frozen=True, slots=True)
class FFN:
    """One feed-forward network: a dense MLP, one routed expert, or a shared expert.

    It computes ``down(act(gate x) * up x)``, or ``down(act(up x))`` where there is no gate.

    up, gate: read as (I, H), the biases as (I,); down: (H, I), its bias (H,).
    act: the activation's name in ``transformers.activations.ACT2FN``.
    expert: index among the layer's routed experts; None for a dense MLP.
    hook: module whose input is the intermediate state, (..., I); None for fused experts.
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

    @property
    def module(self) -> str:
        """The innermost module that holds both `up` and `down`, such as ``model.layers.1.mlp``."""
        return ".".join(os.path.commonprefix([self.up.param.split("."), self.down.param.split(".")]))

    @property
    def inputs(self) -> tuple[WeightSlice, ...]:
        """The matrices whose row i produces intermediate entry i: up, then gate if there is one."""
        return (self.up,) if self.gate is None else (self.up, self.gate)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer.

    path: the module whose output is the residual stream after this layer.
    ffns: its feed-forward networks; one in a dense layer.
    adds: the module whose output is added to the residual stream as the FFN's part: the MLP
        itself, or the norm behind it (gemma2, olmo2).
    """

    path: str
    ffns: tuple[FFN, ...]
    adds: str


@runtime_checkable
class Adapter(Protocol):
    """What a plugin provides for one or several model types, under the entry-point group ``mwtool.adapters``."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        """Decoder layer `index`, counted from 0, of a model with this configuration."""
        ...


def gated_mlp(mlp: str, act: str, *, bias: bool = False) -> FFN:
    """The FFN most models have: ``gate_proj`` and ``up_proj`` (I, H) and ``down_proj`` (H, I) in module `mlp`."""

    def weight(name: str) -> WeightSlice:
        return WeightSlice(f"{mlp}.{name}_proj.weight")

    def bias_of(name: str) -> WeightSlice | None:
        return WeightSlice(f"{mlp}.{name}_proj.bias") if bias else None

    return FFN(
        up=weight("up"),
        gate=weight("gate"),
        down=weight("down"),
        act=act,
        up_bias=bias_of("up"),
        gate_bias=bias_of("gate"),
        down_bias=bias_of("down"),
        hook=f"{mlp}.down_proj",
    )
