"""Which weights stay in full precision: columns of down, rows of up and gate, whole matrices, single weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mwtool.architecture.layout import FFN, WeightSlice

if TYPE_CHECKING:
    from torch import Tensor, nn

Masks = dict[str, "Tensor"]
"""Parameter name -> which of its entries stay, bool, of the parameter's shape as it is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """A set of weights to keep, under a name.

    name: as reports print it. kind: what is kept, the same in every scheme. k: rows or columns a layer, where that
    is a number. control: whether it is a control for the others.
    """

    name: str
    kind: str
    masks: Masks
    k: int | None = None
    control: bool = False

    @property
    def weights(self) -> int:
        """How many weights stay."""
        return sum(int(mask.sum()) for mask in self.masks.values())


def columns_of_down(model: nn.Module, places: Mapping[FFN, Sequence[int]]) -> Masks:
    """Columns of ``W_down`` (H, I) at these intermediate entries of each FFN."""
    masks: Masks = {}
    for ffn, indices in places.items():
        _view(masks, model, ffn.down)[:, list(indices)] = True
    return masks


def rows_of_inputs(model: nn.Module, places: Mapping[FFN, Sequence[int]]) -> Masks:
    """Rows of ``W_up`` and ``W_gate`` (I, H) at these intermediate entries of each FFN."""
    masks: Masks = {}
    for ffn, indices in places.items():
        for matrix in ffn.inputs:
            _view(masks, model, matrix)[list(indices)] = True
    return masks


def matrices_of(model: nn.Module, ffns: Iterable[FFN]) -> Masks:
    """All of up and gate (I, H) and down (H, I) of these FFNs."""
    masks: Masks = {}
    for ffn in ffns:
        for matrix in (*ffn.inputs, ffn.down):
            _view(masks, model, matrix)[...] = True
    return masks


def entries_of_down(model: nn.Module, places: Mapping[FFN, Sequence[tuple[int, int]]]) -> Masks:
    """Single weights ``W_down[d, i]`` of (H, I), such as super weights."""
    masks: Masks = {}
    for ffn, coordinates in places.items():
        for dimension, index in coordinates:
            _view(masks, model, ffn.down)[dimension, index] = True
    return masks


def _view(masks: Masks, model: nn.Module, place: WeightSlice) -> Tensor:
    """The mask of a parameter, made when first asked for, read the way the adapter reads the weight."""
    if place.param not in masks:
        path, _, name = place.param.rpartition(".")
        weight: Tensor = getattr(model.get_submodule(path), name)
        masks[place.param] = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    view = masks[place.param][place.index]
    return view.T if place.transposed else view
