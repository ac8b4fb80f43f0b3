"""Variants of a wrong description of an FFN, one for each common mistake, to find the one that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from itertools import product
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, Index, WeightSlice

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2", "tanh", "sigmoid")
"""Activations used in FFNs."""

Change = Callable[[FFN], FFN]


def similar_descriptions(ffn: FFN, model: nn.Module) -> Iterator[tuple[str, Change]]:
    """Changes of a layer's descriptions that keep all shapes, each with its name, the fewest changes first.

    ffn: one FFN of the layer, from which the possible changes are derived.
    """
    kinds: list[list[tuple[str, Change] | None]] = [[None], [None], [None], [None]]
    if ffn.gate is not None:
        kinds[0] += _arrangements(ffn, model)
        kinds[1].append(("gate and up exchanged", exchanged))
    missing = [f"{name} in {place.param}" for name, place in _biases(ffn, model).items()]
    if missing:
        kinds[2].append((", ".join(missing), partial(_biased, model)))
    if ffn.combine is None:
        kinds[3] += [(f"act={name!r}", partial(_activated, name)) for name in ACTIVATIONS if name != ffn.act]
    found = [[one for one in several if one is not None] for several in product(*kinds)]
    for several in sorted(filter(None, found), key=len):
        yield " and ".join(words for words, _ in several), partial(_all, [change for _, change in several])


def exchanged(ffn: FFN) -> FFN:
    """The FFN with gate and up exchanged; unchanged if there is no gate."""
    if ffn.gate is None:
        return ffn
    return replace(ffn, up=ffn.gate, gate=ffn.up, up_bias=ffn.gate_bias, gate_bias=ffn.up_bias)


def _all(changes: list[Change], ffn: FFN) -> FFN:
    return reduce(lambda changed, change: change(changed), changes, ffn)


def _activated(name: str, ffn: FFN) -> FFN:
    return replace(ffn, act=name)


def _biased(model: nn.Module, ffn: FFN) -> FFN:
    return replace(ffn, **_biases(ffn, model))


def _biases(ffn: FFN, model: nn.Module) -> dict[str, Any]:
    """Biases in the model that the description leaves out, by field name of FFN."""
    there = dict(model.named_parameters())
    matrices = {"up": ffn.up, "gate": ffn.gate, "down": ffn.down}
    given = {"up": ffn.up_bias, "gate": ffn.gate_bias, "down": ffn.down_bias}
    found = {}
    for name, place in matrices.items():
        if place is None or given[name] is not None or not place.param.endswith(".weight"):
            continue
        bias = f"{place.param.removesuffix('weight')}bias"
        if bias in there:
            found[f"{name}_bias"] = WeightSlice(bias, place.index[1:] if place.transposed else place.index[:1])
    return found


def _arrangements(ffn: FFN, model: nn.Module) -> list[tuple[str, Change]]:
    """Gate and up as the two halves of one parameter, and as alternating rows."""
    if ffn.gate is None or ffn.gate.param != ffn.up.param:
        return []
    rows = ffn.up.read(model).shape[0]
    halves, turns = (slice(0, rows), slice(rows, None)), (slice(0, None, 2), slice(1, None, 2))
    return [
        ("gate and up in halves", partial(_cut, halves)),
        ("gate and up in alternating rows", partial(_cut, turns)),
    ]


def _cut(parts: tuple[slice, slice], ffn: FFN) -> FFN:
    gate, up = parts
    return replace(
        ffn,
        gate=_at(ffn.gate, ffn.up, gate),
        up=_at(ffn.up, ffn.gate, up) or ffn.up,
        gate_bias=_at(ffn.gate_bias, ffn.up_bias, gate),
        up_bias=_at(ffn.up_bias, ffn.gate_bias, up),
    )


def _at(place: WeightSlice | None, other: WeightSlice | None, part: slice) -> WeightSlice | None:
    """The slice with `part` where its index differs from that of the other one."""
    if place is None or other is None:
        return place
    index: Index = tuple(part if one != two else one for one, two in zip(place.index, other.index, strict=False))
    return replace(place, index=index)
