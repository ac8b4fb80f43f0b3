"""The conformance checks: properties that scan, ablation and MacDrop rely on, tested on a real model."""

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
from mwtool.testing.variants import exchanged, similar_descriptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS = 1
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest entry, in float32. Summing in another order costs a few 1e-7."""
APART = 1e-3
"""Smallest difference expected between outputs with gate and up swapped, relative to the largest entry."""
IN_PROPORTION = 1e-4
"""Largest relative difference allowed between the experts' ratios of weight to probability."""
LARGE = 30.0
"""Factor applied to up and gate so that a clamp at a few units takes effect."""


def written(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """Writing one element through each slice changes one element of the parameter it names."""
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
    """The output recomputed from the slices is that of the real FFNs, on random tokens, with small and large values."""
    for factor in (1.0, LARGE):
        with _scaled(model, layers, factor):
            for layer, real in _calls(model, layers):
                for name, found, expected in real.compare(model, layer, _same):
                    off = _apart(found, expected)
                    if off > TOLERANCE:
                        said = f"{name}: the output recomputed from the slices is off by {off:.1e} of its largest entry"
                        return said + _remedy(model, layer, real, name)
    return None


def _remedy(model: PreTrainedModel, layer: DecoderLayer, real: _Calls, name: str) -> str:
    """The smallest change of the description with which this FFN agrees; empty if none is known."""
    for words, change in similar_descriptions(layer.ffns[0], model):
        for network, found, expected in real.compare(model, layer, change):
            if network == name and _apart(found, expected) <= TOLERANCE:
                return f"; with {words} it agrees"
    return ""


def swapped(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """With gate and up exchanged, the output must change."""
    for layer, real in _calls(model, layers):
        ours = {name: found for name, found, _ in real.compare(model, layer, _same)}
        for name, found, expected in real.compare(model, layer, _swapped):
            if min(_apart(found, expected), _apart(found, ours[name])) < APART:
                return f"{name}: exchanging gate and up makes no difference"
    return None


def captured(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """The intermediate states that a scan captures are those recomputed from the inputs of the FFNs."""
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
                return f"{layer.experts.block}: its output is not the sum of the outputs of its FFNs"
        if layer.experts is not None and layer.experts.proportional and not _in_proportion(state):
            return (
                f"{layer.experts.router}: the {layer.experts.scores} of its output is not proportional to the weights "
                f"of the chosen experts"
            )
    return None


def _in_proportion(state: LayerState) -> bool:
    """Whether the weights of the chosen experts are proportional to their probabilities."""
    ratios = [p.weight / p.probability for p in state.parts if p.weight is not None and p.probability is not None]
    return max(ratios) - min(ratios) <= IN_PROPORTION * max(ratios)


def added(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """The output of the module `adds` is what the residual stream loses when the layer's `down` matrices are zero.

    With these matrices zero it must not depend on the token, or else it contains the residual.
    """
    states = _walk(model, layers)
    for index, layer in enumerate(layers):
        with _silenced(model, layer):
            without, other = (_walk(model, layers, index, token)[index] for token in (BOS, BOS + 1))
        state = states[index]
        size = float(state.hidden.abs().max())
        off = float((state.hidden - without.hidden - (state.added - without.added)).abs().max()) / size
        if off > TOLERANCE:
            return (
                f"the output of {layer.adds} times {layer.scale:g} is not what is added to the residual stream: off by "
                f"{off:.1e} of its largest entry"
            )
        if float((without.added - other.added).abs().max()) > TOLERANCE * size:
            return f"the output of {layer.adds} contains more than the FFN's: the residual stream or attention"
    return None


def zeroed(model: PreTrainedModel, layers: list[DecoderLayer]) -> str | None:
    """Zeroing rows, biases included, makes the same entries of the intermediate state zero and changes no others."""
    states = _walk(model, layers)
    for index in range(len(layers)):
        for part in states[index].parts:
            rows = part.intermediate.abs().argsort(descending=True)[:3]
            with edited(model, part.ffn, rows.tolist(), Attack("zero", 3)):
                after = _part(_walk(model, layers, index)[index], part.ffn).intermediate
            expected = part.intermediate.index_fill(0, rows, 0.0)
            if after[rows].any():
                return f"{part.ffn.module}: zeroing rows {rows.tolist()} does not zero these entries of the state"
            if _apart(after, expected) > TOLERANCE:
                return f"{part.ffn.module}: zeroing rows {rows.tolist()} changes other entries of the state"
    return None


CHECKS: Mapping[str, Callable[[PreTrainedModel, list[DecoderLayer]], str | None]] = {
    "writes": written,
    "output": recomputed,
    "gate/up": swapped,
    "state": captured,
    "added": added,
    "zeroing": zeroed,
}


@dataclass(slots=True)
class _Calls:
    """Captured inputs and outputs of one layer's FFNs in a forward of T tokens: module path -> (arguments, output)."""

    captured: dict[str, tuple[tuple[Any, ...], Any]]
    experts: str | None

    def input_of(self, ffn: FFN) -> Tensor:
        """The input of the FFN, (T, H)."""
        x: Tensor = self._at(self.experts if ffn.expert is not None and self.experts else _owner(ffn))[0][0]
        return x.reshape(-1, x.shape[-1])

    def compare(
        self, model: nn.Module, layer: DecoderLayer, change: Callable[[FFN], FFN | None]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The name, recomputed output and real output of each FFN, (T, H) each; the routed experts count as one."""
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
        if path not in self.captured:
            raise BadPlugin(
                f"{path} is never called as a module, so its output cannot be captured; describe another one"
            )
        return self.captured[path]


def _calls(
    model: PreTrainedModel, layers: list[DecoderLayer], tokens: list[int] | None = None
) -> list[tuple[DecoderLayer, _Calls]]:
    """Run one forward, by default of 16 random tokens, and capture the inputs and outputs of each layer's FFNs."""
    calls: dict[str, tuple[tuple[Any, ...], Any]] = {}
    paths = {path for layer in layers for path in _places(layer)}

    def keep(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[path] = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args), output.detach().clone()

    hooks = [model.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    torch.manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16)) if tokens is None else torch.tensor([tokens])
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(layer, _Calls(calls, None if layer.experts is None else layer.experts.module)) for layer in layers]


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
    """The layer's FFNs output zero inside the block."""
    places = [place for ffn in layer.ffns for place in (ffn.down, ffn.down_bias) if place is not None]
    return _multiplied(model, places, 0.0)


def _scaled(model: nn.Module, layers: list[DecoderLayer], factor: float) -> AbstractContextManager[None]:
    """Up and gate of all FFNs are multiplied by `factor` inside the block."""
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
