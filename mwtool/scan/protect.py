"""Where rows of up and gate, and columns of down, are stored: what to keep in high precision when quantizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.architecture.layout import FFN

if TYPE_CHECKING:
    from torch import nn

    from mwtool.models.streaming import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """Entries of one parameter that belong to ranked rows.

    parameter: its name in memory; checkpoint_name: in the files, None where several tensors are merged into it.
    dim, indices: the entries, along that dimension of the parameter.
    expert: entry along the parameter's first dimension, where it holds all experts.
    """

    parameter: str
    checkpoint_name: str | None
    dim: int
    indices: tuple[int, ...]
    expert: int | None = None


def to_protect(ffn: FFN, model: nn.Module, indices: Sequence[int], stream: Stream | None) -> tuple[Protected, ...]:
    """Rows of up and gate and columns of down, as places in the model's parameters; fused matrices are merged."""
    places: dict[tuple[str, int], list[int]] = {}
    for matrix in ffn.inputs:
        dim, rows = matrix.rows(list(indices), _shape(model, matrix.param))
        places.setdefault((matrix.param, dim), []).extend(rows)
    dim, columns = ffn.down.columns(list(indices), _shape(model, ffn.down.param))
    places.setdefault((ffn.down.param, dim), []).extend(columns)
    return tuple(
        Protected(
            parameter=name,
            checkpoint_name=name if stream is None else stream.checkpoint_name(name, ffn.expert),
            dim=dim,
            indices=tuple(entries),
            expert=ffn.expert,
        )
        for (name, dim), entries in places.items()
    )


def _shape(model: nn.Module, parameter: str) -> tuple[int, ...]:
    module, _, name = parameter.rpartition(".")
    return tuple(getattr(model.get_submodule(module), name).shape)
