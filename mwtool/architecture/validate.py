"""Validate an adapter's description of each layer: everything it names exists in the model, and shapes match."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, Adapter, DecoderLayer, WeightSlice
from mwtool.architecture.packed import bare_module, packed_dtype
from mwtool.errors import BadCheckpoint, BadPlugin, BadValue

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def decoder_layers(adapter: Adapter, config: PretrainedConfig) -> list[DecoderLayer]:
    """Every decoder layer as the adapter describes it.

    Raises BadPlugin if a description is malformed, BadCheckpoint if the configuration has no decoder layers.
    """
    total: int = config.get_text_config().num_hidden_layers
    if total < 1:
        raise BadCheckpoint(f"the configuration states {total} decoder layers; expected at least 1")
    layers = [adapter.layer(config, index) for index in range(total)]
    for layer in layers:
        fault = _misdescribed(layer)
        if fault:
            raise BadPlugin(f"{adapter} describes {config.model_type!r} with {fault}")
    return layers


def check_fit(adapter: Adapter, layers: Sequence[DecoderLayer], model: nn.Module) -> None:
    """Check that descriptions fit the model. Raises BadPlugin, which names the adapter and the first mismatch.

    The model may be on the meta device. Of routed experts, the first and the last are checked.
    """
    for layer in layers:
        fault = next(_faults(layer, model), None)
        if fault is not None:
            raise BadPlugin(f"{adapter} does not fit {type(model).__name__}: {fault}")


def _misdescribed(layer: object) -> str | None:
    """What is malformed in an adapter's description of a layer, whatever the model."""
    if not isinstance(layer, DecoderLayer) or not _are_ffns(layer.ffns):
        return f"{layer!r}; expected a DecoderLayer with FFNs in a tuple"
    if not isinstance(layer.path, str):
        return f"a layer at {layer.path!r}; expected the name of its module"
    if not isinstance(layer.scale, int | float):
        return f"scale {layer.scale!r} in {layer.path}; expected a number"
    return _ffns_fault(layer)


def _are_ffns(ffns: object) -> bool:
    return isinstance(ffns, tuple | list) and bool(ffns) and all(isinstance(ffn, FFN) for ffn in ffns)


def _ffns_fault(layer: DecoderLayer) -> str | None:
    experts = [ffn.expert for ffn in layer.ffns if ffn.expert is not None]
    others = [ffn for ffn in layer.ffns if ffn.expert is None]
    if any(ffn.hook is None for ffn in others):
        return f"an FFN without a hook in {layer.path}; expected one, except for routed experts"
    if experts != list(range(len(experts))):
        return f"experts {experts} in {layer.path}; expected 0, 1, 2 and so on, in this order"
    if (layer.experts is None) == bool(experts) or len(others) > 1:
        return (
            f"{len(experts)} routed experts and {len(others)} other FFNs in {layer.path}; "
            f"expected one FFN, or routed experts with `experts` set and at most one shared FFN"
        )
    if layer.experts is not None and not isinstance(getattr(layer.experts, "module", None), str):
        return f"{layer.experts!r} for the experts of {layer.path}; expected Experts with the name of their module"
    return None


def _faults(layer: DecoderLayer, model: nn.Module) -> Iterator[str]:
    modules = [layer.path, layer.adds, *[ffn.hook for ffn in layer.ffns if ffn.hook is not None]]
    if layer.experts is not None:
        modules += [layer.experts.module, layer.experts.router]
    for path in modules:
        try:
            model.get_submodule(path)
        except AttributeError:
            yield f"there is no module {path}"
    routed = [ffn for ffn in layer.ffns if ffn.expert is not None]
    if layer.experts is not None and _first_dimensions(layer.experts.module, model) != {len(routed)}:
        yield f"the parameters of {layer.experts.module} do not have a first dimension of {len(routed)} experts"
    for ffn in [*[ffn for ffn in layer.ffns if ffn.expert is None], *routed[:1], *routed[-1:]]:
        yield from _mismatches(ffn, model)


def _first_dimensions(experts: str, model: nn.Module) -> set[int]:
    """The sizes of the first dimension of a module's parameters."""
    module = bare_module(model, experts)  # PEFT's layers have no parameters themselves
    return {parameter.shape[0] if parameter.ndim else 0 for parameter in module.parameters(recurse=False)}


def _mismatches(ffn: FFN, model: nn.Module) -> Iterator[str]:
    from transformers.activations import ACT2FN

    if not isinstance(ffn.act, str) or ffn.act not in ACT2FN:
        yield f"act is {ffn.act!r}; expected a name in transformers.activations.ACT2FN"
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias"):
        place: WeightSlice | None = getattr(ffn, name)
        if place is None and name not in ("up", "down"):
            continue
        if not isinstance(place, WeightSlice):
            yield f"{name} is {place!r}; expected a WeightSlice"
            return
        if not _is_basic_index(place.index):
            yield f"{name}, in {place.param}, has index {place.index!r}; expected a tuple of integers and slices"
            return
        try:
            shapes[name] = tuple(place.read(model).shape)
        except (AttributeError, IndexError, TypeError, ValueError) as fault:
            yield f"{name} is {place.param}{_brackets(place)}, which cannot be read: {fault}"
            return
    rows, columns = (*shapes["up"], 0)[:2]
    expected = {"up": (rows, columns), "gate": (rows, columns), "down": (columns, rows), "up_bias": (rows,)}
    expected |= {"gate_bias": (rows,), "down_bias": (columns,)}
    packed = any(packed_dtype(model, getattr(ffn, name)) for name in shapes)
    for name, shape in shapes.items():
        if shape != expected[name] and not packed:  # packed weights have other shapes
            place = getattr(ffn, name)
            where = f"{place.param}{_brackets(place)}"
            yield f"{name}, {where}, has shape {shape}; expected {expected[name]}, since up is {shapes['up']}"


def _is_basic_index(index: object) -> bool:
    """Whether indexing gives a view. A list of rows, for example, gives a copy, and writing to it changes nothing."""
    return isinstance(index, tuple) and all(type(part) in (int, slice) for part in index)


def _brackets(place: WeightSlice) -> str:
    if not place.index:
        return ""
    parts = [str(part) if isinstance(part, int) else _colons(part) for part in place.index]
    return f"[{', '.join(parts)}]"


def _colons(part: slice) -> str:
    bounds = ["" if bound is None else str(bound) for bound in (part.start, part.stop)]
    return ":".join([*bounds, *([] if part.step is None else [str(part.step)])])


def ffn_at(layers: tuple[DecoderLayer, ...], layer: int, expert: int | None = None) -> FFN:
    """The FFN of a decoder layer, or one of its routed experts. Raises BadValue if there is none."""
    if not 0 <= layer < len(layers):
        raise BadValue(f"layer {layer} does not exist; the model has layers 0 to {len(layers) - 1}")
    found = [ffn for ffn in layers[layer].ffns if ffn.expert == expert]
    if not found:
        experts = sorted(ffn.expert for ffn in layers[layer].ffns if ffn.expert is not None)
        has = f"experts {experts[0]} to {experts[-1]}" if experts else "one dense FFN and no experts"
        if expert is None:
            raise BadValue(f"layer {layer} has {has}; choose one with --expert")
        raise BadValue(f"layer {layer} has {has}; there is no expert {expert}: change --expert")
    return found[0]


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DDP, torch.compile and PEFT wrappers: the one whose parameters adapters name.

    Typed as Any because its attributes depend on its class.
    """
    import torch

    mixed = getattr(sys.modules.get("peft"), "PeftMixedModel", ())  # avoids importing peft, which takes a second
    inner: Any = model
    while not hasattr(inner, "get_base_model"):
        if isinstance(inner, mixed):
            inner = inner.base_model.model
            break
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, torch.nn.Module) or hasattr(inner, "config"):
            return inner if isinstance(inner, torch.nn.Module) else model
        inner = wrapped
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
