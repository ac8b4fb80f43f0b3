"""Integers of 4 and 8 bits packed into words of 32, as compressed-tensors, GPTQ and AWQ store weights.

A weight is scale * (q - zero point), both by group of input columns, in the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
"""Bits of a word."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in words, (R, W) to (R, W * 32 / bits), the lowest bits first."""
    import torch

    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """A weight as compressed-tensors stores it: integers packed along the input, or unpacked as int8."""

    name: str
    parts: Mapping[str, Any]

    def shape(self) -> list[int]:
        """(out, in)."""
        if "weight_packed" in self.parts:
            return [int(size) for size in self.parts["weight_shape"][...].tolist()]
        return list(self.parts["weight"].get_shape())

    def weight(self) -> Tensor:
        """(out, in), in the dtype of its scales. Raises BadCheckpoint where the parts do not fit one another."""
        out, columns = self.shape()
        scale = self.parts["weight_scale"][...]
        zeros = self.parts["weight_zero_point"][...] if "weight_zero_point" in self.parts else None
        if "weight_packed" in self.parts:
            words = self.parts["weight_packed"][...]
            bits = next((b for b in (4, 8) if words.shape == (out, -(-columns * b // WORD))), None)
            if bits is None:
                raise BadCheckpoint(
                    f"{self.name} packs {[out, columns]} into {list(words.shape)} words; mwtool reads 4 and 8 bits"
                )
            half = 1 << (bits - 1)
            numbers = unpacked(words, bits)[:, :columns] - half
            if zeros is not None and zeros.element_size() == WORD // 8:  # packed, along the output
                zeros = unpacked(zeros.T, bits).T[: scale.shape[0]] - half
        else:
            numbers = self.parts["weight"][...]
        return self._scaled(numbers, scale, zeros)

    def _scaled(self, numbers: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensor:
        """numbers: (out, in). scale, zeros: (out, groups), (out, 1) for one group, or one number for all."""
        shifted = numbers.to(scale.dtype)
        if scale.ndim == 2 and scale.shape[1] > 1:  # noqa: PLR2004 - of a matrix
            group = self._groups(numbers.shape[1], scale.shape[1], scale)
            scale, zeros = scale[:, group], None if zeros is None else zeros[:, group]
        if zeros is not None:
            shifted = shifted - zeros.to(scale.dtype)
        return shifted * scale

    def _groups(self, columns: int, groups: int, like: Tensor) -> Tensor:
        """The group of each column: in order, unless they were sorted by activation."""
        import torch

        stated: Tensor | None = self.parts["weight_g_idx"][...] if "weight_g_idx" in self.parts else None
        if stated is not None and not (stated < 0).any():  # -1 where they were not
            return stated.long()
        if columns % groups:
            raise BadCheckpoint(f"{self.name} has {groups} groups of scales for {columns} columns; expected a divisor")
        return torch.arange(columns, device=like.device) // (columns // groups)


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight numbers in a word is the first, second and so on, in the layout of AWQ's matrix kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transposed:
    """A weight as GPTQ and AWQ store it, (in, out).

    bits: of a number. awq: AWQ's layout, packed along the output, in its order; else GPTQ's, packed along the input.
    offset: what is added to each stored zero point, 1 in GPTQ's first layout.
    """

    name: str
    parts: Mapping[str, Any]
    bits: int
    awq: bool = False
    offset: int = 0

    def shape(self) -> list[int]:
        """(out, in)."""
        rows, columns = self.parts["qweight"].get_shape()
        each = WORD // self.bits
        return [columns * each, rows] if self.awq else [columns, rows * each]

    def weight(self) -> Tensor:
        """(out, in), in the dtype of its scales. Raises BadCheckpoint where the parts do not fit one another."""
        words, zeros, scale = (self.parts[part][...] for part in ("qweight", "qzeros", "scales"))
        numbers = self._in_order(words) if self.awq else unpacked(words.T, self.bits).T  # (in, out)
        one = sum(1 << place for place in range(0, WORD, self.bits))  # in words: a number that overflows carries
        zeros = self._in_order(zeros) if self.awq else unpacked(zeros + one * self.offset, self.bits)
        zeros = zeros[:, : scale.shape[1]]
        if numbers.shape[1] != scale.shape[1] or zeros.shape != scale.shape or numbers.shape[0] % scale.shape[0]:
            raise BadCheckpoint(
                f"{self.name} has {self.bits}-bit numbers {list(numbers.shape)}, zero points {list(zeros.shape)} and "
                f"scales {list(scale.shape)}; expected the last two alike, by group of the first"
            )
        group = self._groups(numbers.shape[0], scale)
        weight: Tensor = (numbers - zeros[group]).to(scale.dtype) * scale[group]
        return weight.T

    def _groups(self, rows: int, scale: Tensor) -> Tensor:
        import torch

        if "g_idx" in self.parts and not self.awq:
            return self.parts["g_idx"][...].long()  # type: ignore[no-any-return] # a lazy tensor
        return torch.arange(rows, device=scale.device) // (rows // scale.shape[0])

    def _in_order(self, words: Tensor) -> Tensor:
        numbers = unpacked(words, self.bits)
        return numbers.reshape(*numbers.shape[:-1], -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].flatten(-2)
