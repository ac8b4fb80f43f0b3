"""Formats of packed weights: the tensors each stores for a weight, and how they are undone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models.packed_integers import CompressedTensors, Transposed

if TYPE_CHECKING:
    from torch import Tensor


class Packed(Protocol):
    """One packed weight, not read yet."""

    def shape(self) -> list[int]:
        """(out, in) of the weight."""

    def weight(self) -> Tensor:
        """Read and dequantized, (out, in), in the dtype the format gives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a module's tensors are called, after its path.

    method: as config.json calls it. title: in a sentence. parts: every tensor that belongs to a packed weight.
    marks: those of which one is there if the weight is packed. needed: those it cannot be undone without.
    holds: the one with the packed numbers. open: from a weight's name and its parts, lazy.
    """

    method: str
    title: str
    parts: tuple[str, ...]
    marks: tuple[str, ...]
    needed: tuple[str, ...]
    holds: str
    open: Callable[[str, Mapping[str, Any]], Packed]


STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
"""What else bitsandbytes knows of a weight of 4 bits: its shape, dtype and block sizes, as JSON in bytes."""
FOUR_BITS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES)


@dataclass(frozen=True, slots=True)
class FourBits:
    """A weight of 4 bits as bitsandbytes stores it: NF4 or FP4, its scales quantized in turn or not."""

    name: str
    parts: Mapping[str, Any]

    def shape(self) -> list[int]:
        """(out, in), as stated in the packed state. Raises BadCheckpoint."""
        state = next(self.parts[key] for key in STATES if key in self.parts)
        try:
            return [int(size) for size in json.loads(bytes(state[...].tolist()))["shape"]]
        except (ValueError, KeyError, TypeError) as fault:
            raise BadCheckpoint(f"{self.name} has a state of bitsandbytes without its shape; get it again") from fault

    def weight(self) -> Tensor:
        """(out, in), by bitsandbytes, in the dtype that was quantized. Raises BadCheckpoint."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stored = {part: tensor[...] for part, tensor in self.parts.items()}
        packed = stored.pop("weight")
        try:
            state = QuantState.from_dict(stored, device=packed.device)
            found: Tensor = dequantize_4bit(packed, state)
        except (AssertionError, KeyError, ValueError, RuntimeError, AttributeError) as fault:
            line = " ".join(f"{type(fault).__name__} {fault}".split())
            raise BadCheckpoint(f"{self.name} cannot be undone by bitsandbytes: {line}; get it again") from fault
        return found


@dataclass(frozen=True, slots=True)
class EightBits:
    """A weight of 8 bits as bitsandbytes stores it: integers, and the largest absolute value of each row."""

    name: str
    parts: Mapping[str, Any]

    def shape(self) -> list[int]:
        """(out, in)."""
        return list(self.parts["weight"].get_shape())

    def weight(self) -> Tensor:
        """(out, in), by bitsandbytes, in float32. Raises BadCheckpoint."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        numbers, largest = self.parts["weight"][...], self.parts["SCB"][...]
        if largest.shape != numbers.shape[:1] or numbers.element_size() != 1:
            raise BadCheckpoint(
                f"{self.name} holds {numbers.dtype} {list(numbers.shape)} and scales {list(largest.shape)}; expected "
                f"int8, and one scale a row"
            )
        if "weight_format" in self.parts and self.parts["weight_format"][...].item():
            raise BadCheckpoint(f"{self.name} is stored in the order of a kernel; expected it by rows")
        found: Tensor = int8_vectorwise_dequant(numbers, largest)
        return found


def format_of(name: str, method: str, stated: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint; None if it is none of those here. stated: quantization_config.

    name: the model's. Raises UnsupportedModel for one that needs a library which is missing, or a kind not read here.
    """
    return FORMATS[method](name, stated) if method in FORMATS else None


def _bitsandbytes(name: str, stated: Mapping[str, Any]) -> Format:
    if find_spec("bitsandbytes") is None:
        raise UnsupportedModel(
            f"{name} is quantized with bitsandbytes, which undoes it and is not installed; `pip install bitsandbytes`"
        )
    if stated.get("load_in_8bit") or stated.get("_load_in_8bit"):
        return Format(
            method="bitsandbytes",
            title="bitsandbytes, 8 bit",
            parts=("weight", "SCB", "weight_format"),
            marks=("SCB",),
            needed=("weight", "SCB"),
            holds="weight",
            open=EightBits,
        )
    return Format(
        method="bitsandbytes",
        title=f"bitsandbytes, {stated.get('bnb_4bit_quant_type', '4 bit')}",
        parts=FOUR_BITS,
        marks=STATES,
        needed=("weight", "weight.absmax", "weight.quant_map"),
        holds="weight",
        open=FourBits,
    )


COMPRESSED = ("pack-quantized", "int-quantized")
"""Formats of compressed-tensors that are read."""


def _compressed_tensors(name: str, stated: Mapping[str, Any]) -> Format:
    groups = stated.get("config_groups") or {}
    found = {group.get("format") or stated.get("format") for group in groups.values()} or {stated.get("format")}
    weights = [group.get("weights") or {} for group in groups.values()]
    others = sorted(map(str, found - set(COMPRESSED)))
    strategies = sorted({str(one.get("strategy")) for one in weights} - {"None", "tensor", "channel", "group"})
    if others or strategies or stated.get("transform_config"):
        raise UnsupportedModel(
            f"{name} is stored by compressed-tensors as {', '.join([*others, *strategies]) or 'transformed weights'}; "
            f"mwtool reads {' and '.join(COMPRESSED)}, by tensor, channel or group; scan the original model, whose "
            f"massive rows are the same"
        )
    bits = sorted({f"int{one['num_bits']}" for one in weights if "num_bits" in one})
    packed = "pack-quantized" in found
    return Format(
        method="compressed-tensors",
        title=" ".join(["compressed-tensors,", *sorted(map(str, found)), *bits]),
        parts=("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        marks=("weight_packed",) if packed else ("weight_scale",),
        needed=("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale"),
        holds="weight_packed" if packed else "weight",
        open=CompressedTensors,
    )


def _gptq(name: str, stated: Mapping[str, Any]) -> Format:
    layout = str(stated.get("checkpoint_format") or "gptq")
    bits = stated.get("bits")
    others = {one.get("bits", bits) for one in (stated.get("dynamic") or {}).values() if isinstance(one, dict)} - {bits}
    if layout not in ("gptq", "gptq_v2") or bits not in (4, 8) or others:
        raise UnsupportedModel(
            f"{name} is quantized with gptq, {layout}, in {', '.join(map(str, [bits, *others]))} bits; mwtool reads "
            f"the layouts gptq and gptq_v2 in 4 or 8 bits throughout; scan the original model, whose massive rows are "
            f"the same"
        )
    offset = int(layout == "gptq")  # whose writers subtract 1
    return _transposed(
        "gptq",
        f"GPTQ, {bits} bit",
        lambda weight, parts: Transposed(name=weight, parts=parts, bits=bits, offset=offset),
    )


def _awq(name: str, stated: Mapping[str, Any]) -> Format:
    layout, bits = str(stated.get("version") or "gemm").lower(), stated.get("bits", stated.get("w_bit"))
    if layout != "gemm" or bits != 4:  # noqa: PLR2004 - the only width AWQ's own kernels have
        raise UnsupportedModel(
            f"{name} is quantized with awq, {layout}, in {bits} bits; mwtool reads the layout gemm in 4 bits; scan the "
            f"original model, whose massive rows are the same"
        )
    return _transposed(
        "awq", "AWQ, 4 bit", lambda weight, parts: Transposed(name=weight, parts=parts, bits=4, awq=True)
    )


def _transposed(method: str, title: str, opened: Callable[[str, Mapping[str, Any]], Packed]) -> Format:
    return Format(
        method=method,
        title=title,
        parts=("qweight", "qzeros", "scales", "g_idx"),
        marks=("qweight",),
        needed=("qweight", "qzeros", "scales"),
        holds="qweight",
        open=opened,
    )


FORMATS: dict[str, Callable[[str, Mapping[str, Any]], Format]] = {
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
"""What reads a method's quantization_config, by the name of the method."""
