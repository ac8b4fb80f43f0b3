"""The properties an adapter's description must have, each held against a real model.

Scan, ablation and MacDrop rely on them; `mwtool.testing` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer, WeightSlice
from mwtool.architecture.reference import recompute
from mwtool.errors import BadPlugin
from mwtool.scan.capture import LayerState, Part, walk, wide
from mwtool.surgery.attack import Attack, edited
from mwtool.testing.variants import exchanged, nearby

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS = 1
TOLERANCE = 1e-5
"""Of the largest entry, in float32: a matrix product taken in another order differs by a few 1e-7."""
APART = 1e-3
"""Of the largest entry: swapped matrices must differ by more than this."""
IN_PROPORTION = 1e-4
"""Of the largest: what ratios of an expert's weight to its probability may differ by."""
LARGE = 30.0
"""What up and gate are multiplied by so that a clamp of a few units is reached."""


def writes_reach(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """One element written through each slice changes one element of the parameter it names."""
    for ffn in _ffns(layers):
        for place in (ffn.up, ffn.gate, ffn.down, ffn.up_bias, ffn.gate_bias, ffn.down_bias):
            if place is None:
                continue
            parameter = model.get_parameter(place.param)
            before, view = parameter.detach().clone(), place.read(model)
            at = tuple(int(torch.randint(size, ())) for size in view.shape)
            view[at] += 1
            changed = int((parameter.detach() != before).sum())
            parameter.data.copy_(before)
            if changed != 1:
                return f"a write through {place.param} at {at} changed {changed} entries of the parameter; expected 1"
    return None


def recomputed(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """The formula applied to the slices gives what the real networks give, on random tokens, small and large."""
    for factor in (1.0, LARGE):
        with _scaled(model, layers, factor):
            for layer, real in _calls(model, layers):
                for name, found, expected in real.compare(model, layer, _same):
                    off = _apart(found, expected)
                    if off > TOLERANCE:
                        said = f"{name}: recomputed from the slices it differs by {off:.1e} of its largest entry"
                        return said + _remedy(model, layer, real, name)
    return None


def _remedy(model: PreTrainedModel, layer: DecoderLayer, real: _Calls, name: str) -> str:
    """The smallest change of the description under which this network agrees; empty where none is known."""
    for words, change in nearby(layer.ffns[0], model):
        for network, found, expected in real.compare(model, layer, change):
            if network == name and _apart(found, expected) <= TOLERANCE:
                return f"; with {words} it agrees"
    return ""


def swapped(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """With gate and up exchanged the formula must not give the same: they are told apart."""
    for layer, real in _calls(model, layers):
        ours = {name: found for name, found, _ in real.compare(model, layer, _same)}
        for name, found, expected in real.compare(model, layer, _swapped):
            if min(_apart(found, expected), _apart(found, ours[name])) < APART:
                return f"{name}: gate and up may be exchanged without a difference"
    return None


def captured(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """The intermediate states a walk captures are those recomputed from the networks' inputs."""
    states = _walk(model, layers)
    for (layer, real), state in zip(_calls(model, layers, [BOS]), states, strict=True):
        for part in state.parts:
            x = real.input_of(part.ffn)
            z = wide(recompute(part.ffn, model, x)[0][0])
            off = _apart(part.intermediate, z)
            if off > TOLERANCE:
                return f"{part.ffn.module}: the captured state differs from the recomputed one by {off:.1e}"
        if layer.experts is not None and layer.adds == layer.experts.block:
            total = sum((part.output for part in state.parts), torch.zeros_like(state.added)) * layer.scale
            if _apart(total, state.added) > TOLERANCE:
                return f"{layer.experts.block}: its networks' outputs do not add up to what it gives"
        if layer.experts is not None and layer.experts.proportional and not _in_proportion(state):
            return (
                f"{layer.experts.router}: as {layer.experts.scores} its output is not in proportion to the weights of "
                f"the experts chosen"
            )
    return None


def _in_proportion(state: LayerState) -> bool:
    """Whether the probabilities of the experts chosen are to each other as their weights are."""
    ratios = [p.weight / p.probability for p in state.parts if p.weight is not None and p.probability is not None]
    return max(ratios) - min(ratios) <= IN_PROPORTION * max(ratios)


def added(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """What a layer's FFN is said to add is what the residual stream lacks while its `down` matrices are zero.

    With them zero it must not depend on the token, or the residual is part of it.
    """
    states = _walk(model, layers)
    for index, layer in enumerate(layers):
        with _silenced(model, layer):
            without, other = (_walk(model, layers, index, token)[index] for token in (BOS, BOS + 1))
        state = states[index]
        size = float(state.hidden.abs().max())
        off = float((state.hidden - without.hidden - (state.added - without.added)).abs().max()) / size
        if off > TOLERANCE:
            return f"{layer.adds} times {layer.scale:g} is not what the stream receives: {off:.1e} of its largest off"
        if float((without.added - other.added).abs().max()) > TOLERANCE * size:
            return f"{layer.adds} gives more than the FFN's part: the residual, or attention, is in it"
    return None


def zeroed(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """Rows that surgery zeroes, biases included, are the entries of the state that become zero, and no others."""
    states = _walk(model, layers)
    for index in range(len(layers)):
        for part in states[index].parts:
            rows = part.intermediate.abs().argsort(descending=True)[:3]
            with edited(model, part.ffn, rows.tolist(), Attack("zero", 3)):
                after = _part(_walk(model, layers, index)[index], part.ffn).intermediate
            expected = part.intermediate.index_fill(0, rows, 0.0)
            if after[rows].any():
                return f"{part.ffn.module}: rows {rows.tolist()} are zero and their entries of the state are not"
            if _apart(after, expected) > TOLERANCE:
                return f"{part.ffn.module}: zeroing rows {rows.tolist()} changed other entries of the state"
    return None


CHECKS: Mapping[str, Callable[[PreTrainedModel, list[DecoderLayer]], str | None]] = {
    "writes": writes_reach,
    "output": recomputed,
    "gate/up": swapped,
    "state": captured,
    "added": added,
    "zeroing": zeroed,
}


@dataclass(slots=True)
class _Calls:
    """What went in and out of one layer's networks: module path -> (arguments, output), in a forward of T tokens."""

    seen: dict[str, tuple[tuple[Any, ...], Any]]
    experts: str | None

    def input_of(self, ffn: FFN) -> Tensor:
        """(T, H)."""
        x: Tensor = self._at(self.experts if ffn.expert is not None and self.experts else _owner(ffn))[0][0]
        return x.reshape(-1, x.shape[-1])

    def compare(
        self, model: nn.Module, layer: DecoderLayer, change: Callable[[FFN], FFN | None]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, output by the formula, real output of each network, the routed experts as one."""
        for ffn in layer.ffns:
            changed = change(ffn)
            if ffn.expert is None and ffn.hook is not None and changed is not None:
                real = self._at(ffn.hook)[1]
                yield ffn.module, recompute(changed, model, self.input_of(ffn))[1], real.reshape(-1, real.shape[-1])
        if layer.experts is not None:
            (x, chosen, weights), real = self._at(layer.experts.module)
            total = torch.zeros_like(x)
            for token in range(len(x)):
                for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                    changed = change(layer.ffns[expert])
                    if changed is None:
                        return
                    total[token] += weight * recompute(changed, model, x[token])[1]
            yield layer.experts.module, total, real

    def _at(self, path: str) -> tuple[tuple[Any, ...], Any]:
        if path not in self.seen:
            raise BadPlugin(f"{path} is never called as a module, so nothing can be captured there")
        return self.seen[path]


def _calls(
    model: PreTrainedModel, layers: list[DecoderLayer], tokens: list[int] | None = None
) -> list[tuple[DecoderLayer, _Calls]]:
    """One forward, by default of 16 random tokens, and what each layer's networks received and gave."""
    seen: dict[str, tuple[tuple[Any, ...], Any]] = {}
    paths = {path for layer in layers for path in _places(layer)}

    def keep(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen[path] = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args), output.detach().clone()

    hooks = [model.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    torch.manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16)) if tokens is None else torch.tensor([tokens])
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(layer, _Calls(seen, None if layer.experts is None else layer.experts.module)) for layer in layers]


def _places(layer: DecoderLayer) -> Iterator[str]:
    if layer.experts is not None:
        yield layer.experts.module
    for ffn in layer.ffns:
        if ffn.expert is None and ffn.hook is not None:
            yield from (_owner(ffn), ffn.hook)


def _owner(ffn: FFN) -> str:
    """The module that holds `up`: its input is the FFN's."""
    return ffn.up.param.rpartition(".")[0]


def _walk(
    model: PreTrainedModel, layers: list[DecoderLayer], last: int | None = None, token: int = BOS
) -> list[LayerState]:
    """States of one token, bos by default, up to layer `last`."""
    return walk(model, layers if last is None else layers[: last + 1], token, spike=float("inf"))


def _part(state: LayerState, ffn: FFN) -> Part:
    return next(part for part in state.parts if part.ffn.up == ffn.up)


def _silenced(model: nn.Module, layer: DecoderLayer) -> AbstractContextManager[None]:
    """The layer's networks give nothing inside the block."""
    places = [place for ffn in layer.ffns for place in (ffn.down, ffn.down_bias) if place is not None]
    return _multiplied(model, places, 0.0)


def _scaled(model: nn.Module, layers: list[DecoderLayer], factor: float) -> AbstractContextManager[None]:
    """All networks' up and gate are larger inside the block."""
    return _multiplied(model, [place for ffn in _ffns(layers) for place in ffn.inputs], factor)


@contextmanager
def _multiplied(model: nn.Module, places: list[WeightSlice], factor: float) -> Iterator[None]:
    kept = [place.read(model).clone() for place in places]
    for place in places:
        place.read(model).mul_(factor)
    try:
        yield
    finally:
        for place, values in zip(places, kept, strict=True):
            place.read(model).copy_(values)


def _ffns(layers: list[DecoderLayer]) -> Iterator[FFN]:
    for layer in layers:
        yield from layer.ffns


def _same(ffn: FFN) -> FFN:
    return ffn


def _swapped(ffn: FFN) -> FFN | None:
    return None if ffn.gate is None else exchanged(ffn)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
