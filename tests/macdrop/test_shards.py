"""Shards: what each process reads and writes is its own part of the rows, and all parts are the rows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from mwtool.architecture.layout import WeightSlice
from mwtool.errors import UnsupportedModel
from mwtool.macdrop.fsdp import local_index, local_tensor

ROWS = [5, 0, 3]
PLACES = {
    "plain": ((7, 5), WeightSlice("w")),
    "transposed": ((5, 7), WeightSlice("w", transposed=True)),
    "fused": ((14, 5), WeightSlice("w", (slice(7, None),))),
    "expert": ((3, 14, 5), WeightSlice("w", (1, slice(7)))),
    "interleaved": ((3, 5, 14), WeightSlice("w", (2, slice(None), slice(1, None, 2)), transposed=True)),
}


@dataclass
class Mesh:
    """Of two dimensions; this process's place in it."""

    sizes: tuple[int, ...]
    place: tuple[int, ...]

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_local_rank(self, dim: int) -> int:
        return self.place[dim]


def shard(whole: Tensor, placements: list[Any], mesh: Mesh) -> Tensor:
    """As torch.chunk cuts, dimension after dimension of the mesh; a process may be left with nothing."""
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            parts = torch.chunk(whole, mesh.size(dim), placement.dim)
            rank = mesh.get_local_rank(dim)
            whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


@given(
    st.sampled_from(sorted(PLACES)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([None, 0, 1]),
)
def test_parts_are_disjoint_and_together_the_rows(
    name: str, shards: int, others: int, dim: int, other: int | None
) -> None:
    shape, place = PLACES[name]
    placements: list[Any] = [Replicate() if other is None else Shard(other), Shard(min(dim, len(shape) - 1))]
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = whole[place.index]
    expected = (view.T if place.transposed else view)[ROWS]
    seen = torch.zeros_like(expected)
    for rank in range(shards * (1 if other is None else others)):
        mesh = Mesh((others, shards), (rank // shards, rank % shards))
        held = shard(whole, placements, mesh)
        weight: Any = SimpleNamespace(
            shape=torch.Size(shape), device=torch.device("cpu"), device_mesh=mesh, placements=placements
        )
        index, part = local_index(place, ROWS, weight)
        assert torch.equal(held[index], expected if part is None else expected[part])
        seen[slice(None) if part is None else part] += 1
    assert seen.eq(1).all()


def test_another_placement_is_refused() -> None:
    weight: Any = SimpleNamespace(
        shape=torch.Size((7, 5)), device="cpu", device_mesh=Mesh((2,), (0,)), placements=[Partial()]
    )
    with pytest.raises(UnsupportedModel, match="has placement"):
        local_index(WeightSlice("w"), ROWS, weight)


def test_an_ordinary_weight_is_held_whole_and_reading_it_is_a_view() -> None:
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    index, part = local_index(WeightSlice("w"), ROWS, weight)
    assert part is None
    local_tensor(weight)[index] = 1.0
    assert weight[ROWS].eq(1).all()
    assert weight.sum() == 15
