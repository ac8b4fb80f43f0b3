"""A GGUF file as a checkpoint: tensors under transformers' names, dequantized when they are read.

Blocks are undone by the package `gguf`, llama.cpp's own, in float32; then rotary halves are put back in order
and Gemma's 1 is taken off its norms, so that a cast to the dtype of the model comes last. Nothing is written.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mwtool.errors import UnsupportedModel
from mwtool.models.gguf_architectures import Stored
from mwtool.models.gguf_header import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**20
"""Entries dequantized at once: gguf-py needs several times their size while it works."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """One tensor of a mapped file, read as safetensors' slices are: `[...]` whole, `[i:j]` these rows."""

    data: mmap.mmap
    entry: TensorEntry
    stored: Stored

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        shape = list(self.entry.shape if self.stored.expert is None else self.entry.shape[1:])
        return [1, *shape] if self.stored.row else shape

    def get_dtype(self) -> str:
        """As safetensors' slices have it: of what is read, not of the blocks."""
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        import torch

        if isinstance(index, slice) and index.step is None and self._by_row:
            start, stop, _ = index.indices(self.entry.shape[-2])
            return torch.from_numpy(self._rows(start, max(start, stop)))
        return torch.from_numpy(self._whole())[index]

    @property
    def _by_row(self) -> bool:
        """Whether rows can be read alone: of a matrix of which nothing but the blocks is to be undone."""
        return len(self.get_shape()) == 2 and not (self.stored.heads or self.stored.norm or self.stored.row)  # noqa: PLR2004 - a matrix

    def _whole(self) -> np.ndarray:
        """The tensor in float32, as transformers has it."""
        shape = self.get_shape()
        weight = self._rows(0, math.prod(shape[:-1])).reshape(shape)
        if self.stored.heads is not None:
            weight = in_halves(weight, self.stored.heads)
        if self.stored.norm:
            weight = weight - np.float32(1)
        return weight

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, dequantized, (stop - start, W). A vector is one row; an expert's are its own."""
        nbytes = self.entry.nbytes // math.prod(self.entry.shape[:-1])
        first = start + (self.stored.expert or 0) * math.prod(self.entry.shape[1:-1])
        blocks = np.frombuffer(self.data, np.uint8, nbytes * (stop - start), self.entry.offset + nbytes * first)
        return self._dequantized(blocks.reshape(stop - start, nbytes), self.entry.shape[-1])

    def _dequantized(self, blocks: np.ndarray, width: int) -> np.ndarray:
        """Rows of blocks as rows of float32, a chunk at a time."""
        from gguf import dequantize

        result = np.empty((len(blocks), width), np.float32)
        step = max(1, CHUNK // width)
        with np.errstate(all="ignore"):  # what is not finite is found, and named, when the weight is used
            for start in range(0, len(blocks), step):
                result[start : start + step] = dequantize(blocks[start : start + step], self.entry.block_type)
        return result


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries' or keys' rows with the rotary halves of each head one after the other, (heads * D, ...).

    llama.cpp rotates neighbours and stores them as such; transformers rotates entry i with entry i + D / 2.
    """
    pairs = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2)).reshape(weight.shape)


def check_dequantizable(path: Path, entries: Iterable[TensorEntry]) -> None:
    """Raise UnsupportedModel for the first tensor whose block type the package `gguf` cannot undo."""
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind, name in {entry.block_type: entry.name for entry in entries}.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{path}: tensor {name} is stored as {kind.name}, which the package gguf cannot dequantize; "
                f"try: pip install -U gguf, or another quantization of the model"
            ) from None


@contextmanager
def lazy_tensors(entries: Mapping[str, TensorEntry], stored: Mapping[str, Stored]) -> Iterator[dict[str, Any]]:
    """Tensors by checkpoint name, mapped anew for every read, so that a layer's pages leave memory with it.

    entries: by GGUF's name; stored: by checkpoint name.
    """
    files = {entries[one.tensor].file for one in stored.values()}
    opened = {file: _mapped(file) for file in files}
    yield {name: LazyTensor(opened[entries[one.tensor].file], entries[one.tensor], one) for name, one in stored.items()}


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
