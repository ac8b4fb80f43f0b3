"""The part of a weight that this process holds (all of it, or its FSDP2 shard), and where given rows are in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mwtool.architecture.layout import WeightSlice
from mwtool.errors import UnsupportedModel

Index = tuple[Any, ...]
Part = tuple[Tensor, Tensor] | None


def local_tensor(weight: Tensor) -> Tensor:
    """The memory this process holds, (...), detached and writable; of a DTensor, its shard."""
    shard: Any = weight.detach()
    held: Tensor = shard.to_local() if hasattr(shard, "to_local") else shard
    return held


def matrix_shape(place: WeightSlice, weight: Tensor) -> tuple[int, ...]:
    """The shape (out, in) of the whole matrix at `place`, whatever part of it this process holds.

    weight: the parameter that holds it, (...).
    """
    view = torch.empty(weight.shape, device="meta")[place.index]
    return tuple(view.T.shape if place.transposed else view.shape)


def local_index(place: WeightSlice, rows: Sequence[int], weight: Tensor) -> tuple[Index, Part]:
    """An index of the local memory that gives the rows this process holds, and which part of all rows, (R, H), that is.

    The part is None if the process holds all of (R, H).
    Raises UnsupportedModel if the weight is distributed in a way other than FSDP2's.
    """
    shape, spans = tuple(weight.shape), _spans(weight)
    row_dim, row_at = place.rows(list(rows), shape)
    column_dim, column_at = place.columns(list(range(matrix_shape(place, weight)[1])), shape)
    fixed = {dim: part for dim, part in enumerate(place.index) if isinstance(part, int)}
    here = all(part in spans[dim] for dim, part in fixed.items())
    row_part = [n for n, at in enumerate(row_at) if here and at in spans[row_dim]]
    column_part = [n for n, at in enumerate(column_at) if here and at in spans[column_dim]]
    device = weight.device
    index: list[Any] = [slice(None)] * len(shape)
    index[row_dim] = torch.tensor([row_at[n] - spans[row_dim].start for n in row_part], device=device).long()[:, None]
    index[column_dim] = torch.tensor(
        [column_at[n] - spans[column_dim].start for n in column_part], device=device
    ).long()[None, :]
    for dim, part in fixed.items():  # the shard may not hold the expert: then the index is empty
        index[dim] = part - spans[dim].start if here else index[row_dim]
    whole = len(row_part) == len(row_at) and len(column_part) == len(column_at)
    held = None if whole else (torch.tensor(row_part).long()[:, None], torch.tensor(column_part).long()[None, :])
    return tuple(index), held


def _spans(weight: Tensor) -> list[range]:
    """For each dimension, the indices this process holds; all of them unless FSDP2 has sharded the weight."""
    spans = [range(size) for size in weight.shape]
    mesh: Any = getattr(weight, "device_mesh", None)
    for dim, placement in enumerate(getattr(weight, "placements", ())):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise UnsupportedModel(f"a weight has placement {placement}; MacDrop needs FSDP2's Shard or Replicate")
        span, count, rank = spans[placement.dim], mesh.size(dim), mesh.get_local_rank(dim)
        chunk = -(-len(span) // count)  # as torch.chunk: all but the last have the same size
        spans[placement.dim] = span[rank * chunk : (rank + 1) * chunk]
    return spans
