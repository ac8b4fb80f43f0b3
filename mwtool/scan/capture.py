"""The states of each decoder layer during a forward of one token, captured with hooks.

Works on any transformers model, whole in memory or streamed from disk. Routed experts have no
module of their own to hook: their states are recomputed from the experts' input and their slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer, Experts
from mwtool.architecture.packed import is_packed
from mwtool.architecture.reference import recompute
from mwtool.errors import BadCheckpoint, BadPlugin
from mwtool.interrupts import restored

SUPER_WEIGHT_ROUNDS = 10

KEPT = 4
"""Rows of ``W_down`` kept of each network: those of the entries the layer writes most to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperWeight:
    """``down_proj[hidden_dim, ffn_index]``, one weight through which a spike passes (Yu et al. 2024)."""

    layer: int
    hidden_dim: int
    ffn_index: int
    value: float
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One feed-forward network of a layer, in float64 on the CPU.

    intermediate: the input of its ``W_down``, (I,).
    output: its term of the layer's sum, (H,); a routed expert's is weighted by the router.
    probability, weight: the router's probability for a routed expert, and the weight of its output.
    down_rows: d -> ``W_down[d]``, (I,), in the model's dtype, for the few d it writes most to: once a streamed layer
        is gone, its rows can be ranked without reading it again.
    """

    ffn: FFN
    intermediate: Tensor
    output: Tensor
    probability: float | None = None
    weight: float | None = None
    down_rows: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """One decoder layer at the first position, in float64 on the CPU.

    hidden: the residual stream after the layer, (H,).
    intermediate: the input of ``W_down``, (I,); in an MoE layer, of the network with the largest output entry.
    added: what the FFN adds to the residual stream, (H,): after a norm behind the FFN, router weights and scaling.
    parts: its networks: the only one if dense, else the experts that bos is routed to and the shared one.
    probabilities: the router's probabilities of all experts, (E,); None in a dense layer.
    """

    layer: int
    hidden: Tensor
    intermediate: Tensor
    added: Tensor
    super_weights: tuple[SuperWeight, ...] = ()
    parts: tuple[Part, ...] = ()
    probabilities: Tensor | None = None


class _Stop(Exception):
    """Ends a forward between two layers."""


def walk(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    token: int,
    *,
    spike: float,
    device: torch.device | None = None,
    on_layer: Callable[[LayerState], None] | None = None,
) -> list[LayerState]:
    """Run `token` alone at the first position and capture the state of each of `layers`, the model's first ones.

    The forward ends after the last of them: the head is never computed.

    spike: what an input and an output of ``down_proj`` must exceed to look for super weights.
    device: where the token goes; None for that of the first weight, which a streamed model does not have yet.
    Raises BadCheckpoint where the residual stream is not finite.
    """
    states: list[LayerState] = []

    def captured(state: LayerState) -> None:
        states.append(state)
        if on_layer is not None:
            on_layer(state)
        if len(states) == len(layers):
            raise _Stop

    device = device or next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    with _capturing(model, layers, spike, captured), torch.no_grad(), suppress(_Stop):
        model(input_ids=torch.tensor([[token]], device=device), use_cache=False)
    return states


@restored
def _capturing(
    model: nn.Module, layers: Sequence[DecoderLayer], spike: float, captured: Callable[[LayerState], None]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for index, layer in enumerate(layers):
            handles.extend(_Watch(model=model, index=index, layer=layer, spike=spike, captured=captured).hooks())
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True, kw_only=True)
class _Watch:
    """The hooks of one decoder layer, and what they have captured of the forward in progress."""

    model: nn.Module
    index: int
    layer: DecoderLayer
    spike: float
    captured: Callable[[LayerState], None]
    parts: list[Part] = field(default_factory=list)
    supers: list[SuperWeight] = field(default_factory=list)
    caught: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> list[Any]:
        """Registered before any hook that is there already: a streamed layer drops its weights in one."""
        places: list[tuple[str, Callable[..., None]]] = [
            (ffn.hook, self._at_down(ffn)) for ffn in self.layer.ffns if ffn.hook is not None
        ]
        places += [(self.layer.adds, self._at("added")), (self.layer.path, self._at_layer)]
        handles = []
        if self.layer.experts is not None:
            experts = submodule(self.model, self.layer.experts.module)
            handles.append(experts.register_forward_pre_hook(self._before_experts, prepend=True))
            places += self._around(self.layer.experts)
        return handles + [
            submodule(self.model, path).register_forward_hook(hook, prepend=True) for path, hook in places
        ]

    def _around(self, experts: Experts) -> list[tuple[str, Callable[..., None]]]:
        return [
            (experts.router, self._at("logits")),
            (experts.module, self._at_experts),
            (experts.block, self._at("block")),
        ]

    def _at(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.caught[name] = first(output)

        return hook

    def _at_down(self, ffn: FFN) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._take(Part(ffn=ffn, intermediate=first(args[0]), output=first(output)), ffn)

        return hook

    def _before_experts(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) != 3:  # noqa: PLR2004 - the interface `layout.Experts` states
            expected = "(hidden_states, top_k_index, top_k_weights)"
            raise BadPlugin(f"{type(module).__name__} takes {len(args)} arguments; expected {expected}")
        self.caught["chosen"] = args[1][0].cpu()  # (k,): a streamed layer numbers them anew after this

    def _at_experts(self, _module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        x, places, weights = args[0].reshape(-1, args[0].shape[-1])[0], args[1][0].tolist(), args[2][0].tolist()
        self.caught["routed"] = first(output)
        probabilities = self._probabilities()
        for expert, place, weight in zip(self.caught["chosen"].tolist(), places, weights, strict=True):
            z, out = recompute(self.layer.ffns[place], self.model, x)
            held, probability = self.layer.ffns[place], float(probabilities[expert])
            rows = _down_rows(held.down.read(self.model), out)
            self._take(
                Part(
                    ffn=self.layer.ffns[expert],
                    intermediate=wide(z),
                    output=wide(out),
                    probability=probability,
                    weight=weight,
                    down_rows=rows,
                ),
                held,
            )

    def _probabilities(self) -> Tensor:
        """The router's probabilities of all experts, (E,)."""
        assert self.layer.experts is not None
        logits, expected = self._recall("logits", self.layer.experts.router), len(self.layer.ffns)
        expected -= sum(ffn.expert is None for ffn in self.layer.ffns)
        if logits.numel() != expected:
            raise BadPlugin(
                f"the router {self.layer.experts.router} gives {logits.numel()} values; expected {expected}, "
                f"one for each expert"
            )
        return logits.sigmoid() if self.layer.experts.scores == "sigmoid" else logits.softmax(-1)

    def _take(self, part: Part, readable: FFN) -> None:
        """Keep a part, its output not yet weighted. readable: the FFN whose slices hold its weights now."""
        found = super_weights(self.index, readable.down.read(self.model), part.intermediate, part.output, self.spike)
        self.supers += [
            SuperWeight(
                layer=one.layer,
                hidden_dim=one.hidden_dim,
                ffn_index=one.ffn_index,
                value=one.value,
                expert=part.ffn.expert,
            )
            for one in found
        ]
        self.parts.append(part)

    def _refuse(self) -> None:
        """Raise for a stream that is not finite; the weights of a model in memory have not been checked before."""
        later = f"{self.layer.path.rpartition('.')[0]}.{self.index + 1}."
        for name, parameter in takewhile(lambda one: not one[0].startswith(later), self.model.named_parameters()):
            packed = is_packed(self.model.get_submodule(name.rpartition(".")[0]), parameter)
            if not (packed or parameter.is_meta or parameter.isfinite().all()):
                raise BadCheckpoint(f"tensor {name} holds NaN or inf; the checkpoint is damaged")
        raise BadCheckpoint(
            f"the residual stream after layer {self.index} is not finite although its weights are; "
            f"float16 overflows above 65,504: try --dtype bfloat16 or float32"
        )

    def _at_layer(self, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = first(output)
        if not hidden.isfinite().all():
            self._refuse()
        parts, supers = self._weighted(), tuple(self.supers)
        if not parts:
            raise BadPlugin(f"no `hook` of {self.layer.path} runs before that module ends")
        added = self._recall("added", self.layer.adds) * self.layer.scale
        parts = tuple(
            part if part.weight is not None else replace(part, down_rows=self._kept(part, added)) for part in parts
        )
        probabilities = None if self.layer.experts is None else self._probabilities()
        self.parts, self.supers, self.caught = [], [], {}
        main = max(parts, key=lambda part: float(part.output.abs().max()))
        self.captured(
            LayerState(
                layer=self.index,
                hidden=hidden,
                intermediate=main.intermediate,
                added=added,
                super_weights=supers,
                parts=parts,
                probabilities=probabilities,
            )
        )

    def _kept(self, part: Part, added: Tensor) -> dict[int, Tensor]:
        """Read while the layer still has its weights; of routed experts this is done when they run."""
        return _down_rows(part.ffn.down.read(self.model), added)

    def _recall(self, name: str, path: str) -> Tensor:
        if name not in self.caught:
            raise BadPlugin(f"module {path} is named for {self.layer.path} but has not run by the time it is needed")
        return self.caught[name]

    def _weighted(self) -> tuple[Part, ...]:
        """Routed experts by falling weight, then the shared one, whose output is what they do not add up to."""
        if self.layer.experts is None:
            return tuple(self.parts)
        rest = self._recall("block", self.layer.experts.block) - self._recall(
            "routed", self.layer.experts.module
        )  # (H,)
        routed = [replace(part, output=part.output * part.weight) for part in self.parts if part.weight is not None]
        shared = [replace(part, output=rest) for part in self.parts if part.weight is None]
        return (*sorted(routed, key=lambda part: -(part.weight or 0)), *shared)


def _down_rows(down: Tensor, output: Tensor) -> dict[int, Tensor]:
    """``W_down[d]`` for the d with the largest |output[d]|. down: (H, I); output: (H,)."""
    largest = output.abs().topk(min(KEPT, output.numel())).indices.tolist()
    return {d: down[d].to("cpu", copy=True) for d in largest}


def submodule(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule`; raises BadPlugin, naming the path, where the model has no such module."""
    try:
        return model.get_submodule(path)
    except AttributeError as fault:
        raise BadPlugin(f"the adapter names module {path}, which {type(model).__name__} does not have") from fault


def first(output: Any) -> Tensor:
    """The first position's vector of a module's output, in float64 on the CPU.

    Modules return a tensor or a tuple that begins with one, shaped (1, 1, width) or (1, width). Always a copy:
    Falcon adds to its MLP's output in place afterwards.
    """
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return wide(tensor.detach().reshape(-1, tensor.shape[-1])[0])


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU, (...)."""
    return tensor.to("cpu", torch.float64, copy=True)


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
        found.append(SuperWeight(layer=layer, hidden_dim=dim, ffn_index=index, value=value))
        output[dim] -= value * z[index]
    return tuple(found)
