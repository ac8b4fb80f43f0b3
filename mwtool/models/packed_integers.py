"""Integers of 4 and 8 bits packed into words of 32, as compressed-tensors stores weights.

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
