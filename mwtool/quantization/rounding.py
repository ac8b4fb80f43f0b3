"""Round-to-nearest quantization of a weight matrix, simulated in floating point.

The simplest scheme every quantizer starts from: each group of consecutive input weights of an output row shares one
scale. More elaborate methods (GPTQ, AWQ) lose less; the order of what matters is what this measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mwtool.errors import BadValue
from mwtool.files.text import shown

if TYPE_CHECKING:
    from torch import Tensor

LEAST_BITS, MOST_BITS = 2, 8
Levels = Literal["symmetric", "zero-point", "minimum", "nf4"]
"""Where a group's levels lie: see `round_to_nearest`. Zero is a level of all of them but `minimum`."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of 4-bit NormalFloat over the largest magnitude of a group (Dettmers et al. 2023, QLoRA, appendix E)."""
LEVELS: dict[Levels, str] = {
    "symmetric": "symmetric levels",
    "zero-point": "levels with a zero point",
    "minimum": "levels from each group's minimum",
    "nf4": "NF4 levels",
}
"""In words."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is quantized.

    bits: 2 to 8 for each weight. group: input weights that share a scale; None for a whole output row.
    levels: on both sides of zero; shifted by a whole number of steps; from the smallest weight up; or those of NF4.
    Raises BadValue for NF4 of another number of bits than 4.
    """

    bits: int
    group: int | None = 64
    levels: Levels = "symmetric"

    def __post_init__(self) -> None:
        """See `Scheme`."""
        if self.levels == "nf4" and self.bits != 4:  # noqa: PLR2004 - its name says it
            raise BadValue(f"NF4 has 4 bits; {self.bits} were asked for: add --bits 4")

    def __str__(self) -> str:
        grouped = "per row" if self.group is None else f"in groups of {self.group}"
        return f"{self.bits} bits {grouped}"


def parse_group(text: str) -> int | None:
    """`row`, or a number of input weights from 1 on. Raises BadValue."""
    if text == "row":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):  # noqa: PLR2004 - no width has ten digits
        raise BadValue(f"group {shown(text)} is not understood; expected row or a number from 1 on, such as 64 or 128")
    return int(text)


def parse_bits(text: str) -> tuple[int, ...]:
    """`8,4,3`: numbers from 2 to 8, each once. Raises BadValue."""
    parts = text.split(",")
    if not all(part.strip() in map(str, range(LEAST_BITS, MOST_BITS + 1)) for part in parts):
        raise BadValue(
            f"bits {shown(text)} are not understood; expected numbers from {LEAST_BITS} to {MOST_BITS}: 8,4,3"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def round_to_nearest(weight: Tensor, scheme: Scheme, kept: Tensor | None = None) -> Tensor:
    """The matrix with every weight moved to the nearest of its group's levels, in the matrix's dtype.

    weight: (out, in); computed in float32. kept: (out, in), bool: weights that are given back as they were after
    rounding, as a correction beside any quantizer's result does; they count towards the range of their group.
    A last group may be shorter than the others.

    With b bits, a scale s and a whole number q for each weight:

    symmetric, as compressed-tensors and GPTQ define it: s = 2 max|w| / (2^b - 1), q = round(w / s) within
    [-2^(b-1), 2^(b-1) - 1]; there is one level more below zero than above, so the largest positive weight is clipped
    to (2^b - 2) / (2^b - 1) of itself.
    zero-point, as AWQ and asymmetric GPTQ: s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = round(-min(w, 0) / s),
    q = round(w / s + z) within [0, 2^b - 1], and s (q - z) is the weight.
    minimum, as llama.cpp's Q4_1: s = (max w - min w) / (2^b - 1), q = round((w - min w) / s), and min w + s q is the
    weight. Zero is no level, so weights near zero move too.
    nf4, as bitsandbytes stores QLoRA's base weights: the nearest of `NF4` to w / max|w|, times max|w|.
    """
    width = weight.shape[1]
    size = width if scheme.group is None else min(scheme.group, width)
    whole = width // size * size
    parts = [weight[:, :whole].reshape(-1, size), weight[:, whole:]]
    masks = [None, None] if kept is None else [kept[:, :whole].reshape(-1, size), kept[:, whole:]]
    rounded = [_rounded(part, scheme, mask) for part, mask in zip(parts, masks, strict=True) if part.shape[1]]
    if len(rounded) == 1:
        return rounded[0].reshape(weight.shape)
    result = weight.clone()
    result[:, :whole], result[:, whole:] = rounded[0].reshape(len(weight), whole), rounded[1]
    return result


def _rounded(groups: Tensor, scheme: Scheme, kept: Tensor | None) -> Tensor:
    """Each row of `groups`, (G, size), is a group."""
    from torch import bucketize

    values, most = groups.float(), 2**scheme.bits - 1
    if scheme.levels == "symmetric":
        scale = _safe(2 * values.abs().amax(1, keepdim=True) / most)
        half = 2 ** (scheme.bits - 1)
        found = (values / scale).round_().clamp_(-half, half - 1).mul_(scale)
    elif scheme.levels == "minimum":
        low = values.amin(1, keepdim=True)
        scale = _safe((values.amax(1, keepdim=True) - low) / most)
        found = ((values - low) / scale).round_().mul_(scale).add_(low)
    elif scheme.levels == "nf4":
        levels, scale = values.new_tensor(NF4), _safe(values.abs().amax(1, keepdim=True))
        found = levels[bucketize(values / scale, (levels[1:] + levels[:-1]) / 2)].mul_(scale)
    else:
        low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
        scale = _safe((high - low) / most)
        zero = (-low / scale).round_()
        found = (values / scale).add_(zero).round_().clamp_(0, most).sub_(zero).mul_(scale)
    found = found.to(groups.dtype)
    return found if kept is None else found.where(~kept, groups)


def _safe(scale: Tensor) -> Tensor:
    """A group of equal weights may have no range; any scale gives them back."""
    return scale.masked_fill(scale == 0, 1.0)
