"""Where a feed-forward network's matrices live: what an adapter says about one architecture.

Everything mwtool does (scan, ablation, MacDrop) needs to know which entries of which
parameter form row i of ``W_up`` and ``W_gate``. Architectures store them plain, fused,
transposed or stacked over experts; a `WeightSlice` names the place and reads it as a
writable view, so that the same code serves them all.

Nothing here imports torch or transformers: adapters stay cheap to import.
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
"""Basic indexing only (integers and slices), so that reading gives a view, never a copy."""


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Part of one parameter, read as ``(out_features, in_features)``, or ``(out_features,)`` for a bias.

    param: name in ``model.named_parameters()`` before any wrapping (PEFT adds ``.base_layer``).
    index: basic index into the parameter; ``()`` is all of it.
    transposed: stored as (in, out), as GPT-2's Conv1D does.
    """

    param: str
    index: Index = field(default=(), hash=False)  # slices have no hash before Python 3.12
    transposed: bool = False

    def read(self, model: nn.Module) -> Tensor:
        """A view on the parameter's storage: writing to it changes the model.

        Goes through the module's attribute, which PEFT's layers forward to the base layer.
        Raises AttributeError or IndexError where the parameter or the place does not exist.
        """
        path, _, name = self.param.rpartition(".")
        module: Any = model.get_submodule(path)
        while not hasattr(module, name):  # PEFT's wrapper around expert parameters does not forward them
            module = module.base_layer
        weight: Tensor = getattr(module, name).data
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
    expert: index among the layer's routed experts; None for a dense MLP or a shared expert.
    hook: the module that applies `down`: its input is the intermediate state, (..., I); None for fused experts.
    combine: what makes the intermediate state of ``(gate x, up x)`` where ``act(gate x) * up x`` is not it.
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
        return ".".join(os.path.commonprefix(parts))  # noqa: RUF071 - of lists it compares whole parts

    @property
    def inputs(self) -> tuple[WeightSlice, ...]:
        """The matrices whose row i produces intermediate entry i: up, then gate if there is one."""
        return (self.up,) if self.gate is None else (self.up, self.gate)

    def width(self, model: nn.Module) -> int:
        """I, the width of the intermediate state; packed weights do not show it in their shape, their module does."""
        module = None if self.hook is None else model.get_submodule(self.hook)
        stated = getattr(module, "in_features", None)
        return stated if isinstance(stated, int) else self.up.read(model).shape[0]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer.

    module: called as ``(hidden_states, top_k_index, top_k_weights)``, (T, H), (T, k), (T, k); gives their weighted
        sum. The parameters in it have the experts as their first dimension. The module around it adds
        the shared expert, if there is one.
    router: module whose output is, or begins with, the logits over all experts, (T, E).
    scores: what turns logits into probabilities.
    proportional: whether the weights of the chosen are in proportion to their probabilities, as they are in all
        but phimoe.
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
    ffns: its feed-forward networks: one if dense, else the routed experts in order, then at most one shared.
    adds: the module whose output the residual stream receives as the FFN's part: the MLP itself, the
        norm behind it (gemma2, olmo2), or only its last matrix where the MLP adds the residual (bloom).
    scale: what that output is multiplied by before it is added (granite).
    experts: how bos is routed; None in a dense layer.
    """

    path: str
    ffns: tuple[FFN, ...]
    adds: str
    scale: float = 1.0
    experts: Experts | None = None


@runtime_checkable
class Adapter(Protocol):
    """What a plugin provides for one or several model types, under the entry-point group ``mwtool.adapters``."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        """Decoder layer `index`, counted from 0, of a model with this configuration."""
        ...


def gated_mlp(mlp: str, act: str, *, bias: bool = False) -> FFN:
    """The FFN most models have: ``gate_proj`` and ``up_proj`` (I, H) and ``down_proj`` (H, I) in module `mlp`."""
    ffn = plain_mlp(mlp, "up_proj", "down_proj", act, bias=bias)
    gate_bias = WeightSlice(f"{mlp}.gate_proj.bias") if bias else None
    return replace(ffn, gate=WeightSlice(f"{mlp}.gate_proj.weight"), gate_bias=gate_bias)


def plain_mlp(mlp: str, up: str, down: str, act: str, *, bias: bool = True, transposed: bool = False) -> FFN:
    """An FFN of two matrices and no gate: modules `up` and `down` in module `mlp`.

    transposed: stored as (in, out), in a Conv1D.
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
    """Gate and up in one ``gate_up_proj`` (2I, H): rows 0..I-1 the gate, rows I..2I-1 up. `width` is I."""
    return FFN(
        up=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width, None),)),
        gate=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width),)),
        down=WeightSlice(f"{mlp}.down_proj.weight"),
        act=act,
        hook=f"{mlp}.down_proj",
    )


def fused_experts(experts: str, count: int, width: int, act: str) -> tuple[FFN, ...]:
    """Routed experts in two parameters: ``gate_up_proj`` (E, 2I, H), gate first, and ``down_proj`` (E, H, I)."""
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
