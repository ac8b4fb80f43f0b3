"""Rows of one matrix whose entries can be dropped and put back: in the weight itself, or in what it gives.

Both ways serve any layout through its `WeightSlice`. Writing needs an ordinary frozen
weight, which may be sharded by FSDP2: each process writes what it holds. Where the weight
is packed, a hook computes the rows' outputs again from an unpacked copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.layout import WeightSlice
from mwtool.surgery import WRITABLE


def rows_of_matrix(model: nn.Module, place: WeightSlice, rows: Sequence[int]) -> WrittenRows | RecomputedRows:
    """These rows of the matrix at `place`, by the way its storage allows.

    model: the module whose parameters the adapter names; PEFT may have wrapped layers within it.
    Raises BadValue where the rows are themselves trained, UnsupportedModel where they cannot be reached.
    """
    path, _, name = place.param.rpartition(".")
    outer: Any = model.get_submodule(path)
    layer: Any = outer
    while hasattr(layer, "base_layer"):  # experts are wrapped once for each of their parameters
        layer = layer.base_layer
    weight: Tensor = getattr(outer, name) if hasattr(outer, name) else getattr(layer, name)
    _refuse(place.param, weight)
    magnitudes = getattr(outer, "lora_magnitude_vector", None) or {}
    dora = [magnitudes[adapter] for adapter in magnitudes]
    if weight.dtype in WRITABLE:
        return WrittenRows(layer, name, place, rows, dora)
    if dora:
        raise UnsupportedModel(
            f"{place.param} is quantized under DoRA, whose norm reads packed rows; use LoRA, or load it unquantized"
        )
    return RecomputedRows(layer, place, rows)


class WrittenRows:
    """Rows of a frozen weight, written in place. Keeps a copy of them, (R, H): the only extra memory."""

    how = "weights"

    def __init__(self, layer: nn.Module, name: str, place: WeightSlice, rows: Sequence[int], dora: list[Any]) -> None:
        self.layer, self.name, self.dora = layer, name, dora
        weight: Tensor = getattr(layer, name)
        self.width = _matrix_shape(place, weight)[1]
        self.index, self.part = _reach(place, rows, weight)
        self.kept = _local(weight)[self.index].clone()  # (R, H); under FSDP2 this process's part of it
        self.undo: list[Callable[[], None]] = []

    @property
    def kept_bytes(self) -> int:
        """Memory the copy takes."""
        return self.kept.numel() * self.kept.element_size()

    def drop(self, keep: Tensor) -> None:
        """Zero the entries where `keep`, (R, H) of bool on the CPU, is false; all others get their own values."""
        if not self.undo:
            register: Any = self.layer.register_state_dict_post_hook  # torch does not annotate it
            self.undo.append(register(partial(self._into_state_dict)).remove)  # torch marks the hook, not a method
        if self.dora and not keep.any(1).all():
            for magnitude in self.dora:
                self._guard_norm(magnitude)
        here = keep if self.part is None else keep[self.part]
        self._write(self.kept * here.to(self.kept.device, non_blocking=True))

    def restore(self) -> None:
        """Put the copy back, bit for bit."""
        self._write(self.kept)
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def _write(self, values: Tensor) -> None:
        with torch.no_grad():
            _local(getattr(self.layer, self.name))[self.index] = values

    def _into_state_dict(self, _layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """A state dict taken while entries are dropped holds the pre-trained weight."""
        whole = state[prefix + self.name].detach().clone()
        _local(whole)[self.index] = self.kept
        state[prefix + self.name] = whole

    def _guard_norm(self, magnitude: Any) -> None:
        """DoRA scales a row by magnitude / norm: 0/0 where all of it is dropped and B is zero. Scale by 1 there.

        The row then acts as plain LoRA's would: it gives what the adapter gives, with the gradient of that.
        """
        if "get_weight_norm" in vars(magnitude):
            return
        original = magnitude.get_weight_norm

        def norm(*args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = original(*args, **kwargs)
            stand_in = magnitude.weight.detach().to(found)
            return torch.where(found == 0, torch.where(stand_in == 0, 1.0, stand_in), found)

        magnitude.get_weight_norm = norm

        def unguard() -> None:
            vars(magnitude).pop("get_weight_norm", None)

        self.undo.append(unguard)


class RecomputedRows:
    """Rows of a quantized layer: their outputs are computed again from an unpacked, masked copy, (R, H).

    The layer gives what it would with these rows replaced, in the precision it computes in.
    """

    how = "outputs"

    def __init__(self, layer: Any, place: WeightSlice, rows: Sequence[int]) -> None:
        from peft.utils.integrations import dequantize_module_weight

        if not isinstance(layer, nn.Module) or not isinstance(getattr(layer, "out_features", None), int):
            raise _packed(place.param, getattr(layer, place.param.rpartition(".")[2]).dtype)
        with torch.no_grad():
            whole: Tensor = dequantize_module_weight(layer)  # (out, in), for this moment alone
        if whole.dtype not in WRITABLE:
            raise _packed(place.param, whole.dtype)
        self.layer: Any = layer
        # bitsandbytes turns a Conv1D, which the adapter describes as (in, out), into a layer of (out, in)
        shape = tuple(whole.T.shape if place.transposed else whole.shape)
        self.entries = torch.tensor(place.rows(list(rows), shape)[1], device=whole.device)
        self.kept = whole[self.entries].clone()
        self.width = whole.shape[1]
        self.masked: Tensor | None = None
        self.undo: list[Callable[[], None]] = []

    @property
    def kept_bytes(self) -> int:
        """Memory the copy takes."""
        return self.kept.numel() * self.kept.element_size()

    def drop(self, keep: Tensor) -> None:
        """As `WrittenRows.drop`."""
        self.masked = self.kept * keep.to(self.kept.device, non_blocking=True)
        if not self.undo:
            self.undo.append(self.layer.register_forward_hook(self._replace).remove)

    def restore(self) -> None:
        """Let the layer's own outputs through again."""
        while self.undo:
            self.undo[-1]()
            self.undo.pop()
        self.masked = None

    def _replace(self, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.masked is not None, "the hook is there only while entries are dropped"
        x, bias = args[0], self.layer.bias
        precision = getattr(self.layer, "compute_dtype", None) or x.dtype
        bias = None if bias is None else bias[self.entries].to(precision)
        rows = nn.functional.linear(x.to(precision), self.masked.to(precision), bias)  # (..., R)
        return output.index_copy(-1, self.entries, rows.to(output.dtype))


def _refuse(param: str, weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise UnsupportedModel(f"{param} is partitioned by DeepSpeed ZeRO-3; MacDrop works with ZeRO-2, DDP or FSDP2")
    if weight.requires_grad:
        raise BadValue(
            f"{param} is itself being trained; MacDrop drops entries of frozen weights: freeze it, or train an adapter"
        )
    if weight.is_meta:
        raise UnsupportedModel(
            f"{param} is offloaded and its rows cannot be written; load the model without offloading"
        )


def _packed(param: str, dtype: torch.dtype) -> UnsupportedModel:
    return UnsupportedModel(
        f"{param} holds packed {dtype} weights that cannot be unpacked here; load the model unquantized, or with "
        f"bitsandbytes"
    )


def _matrix_shape(place: WeightSlice, weight: Tensor) -> tuple[int, ...]:
    """(out, in) of the matrix at `place`, whatever part of it this process holds."""
    view = torch.empty(weight.shape, device="meta")[place.index]
    return tuple(view.T.shape if place.transposed else view.shape)


def _local(weight: Tensor) -> Tensor:
    """The memory this process holds, to be read and written; of a DTensor its shard."""
    shard: Any = weight.detach()
    local: Tensor = shard.to_local() if hasattr(shard, "to_local") else shard
    return local


Reach = tuple[tuple[Any, ...], tuple[Tensor, Tensor] | None]


def _reach(place: WeightSlice, rows: Sequence[int], weight: Tensor) -> Reach:
    """Where the rows are: an index into the local memory that gives (R, H), and which part of (R, H) that is.

    The part is None where the process holds all of it.
    """
    shape, spans = tuple(weight.shape), _spans(weight)
    row_dim, row_at = place.rows(list(rows), shape)
    column_dim, column_at = place.columns(list(range(_matrix_shape(place, weight)[1])), shape)
    fixed = {dim: part for dim, part in enumerate(place.index) if isinstance(part, int)}
    here = all(part in spans[dim] for dim, part in fixed.items())
    row_part = [n for n, at in enumerate(row_at) if here and at in spans[row_dim]]
    column_part = [n for n, at in enumerate(column_at) if here and at in spans[column_dim]]
    device = weight.device
    index: list[Any] = [slice(None)] * len(shape)
    for dim, part in fixed.items():
        index[dim] = part - spans[dim].start if here else 0
    index[row_dim] = torch.tensor([row_at[n] - spans[row_dim].start for n in row_part], device=device).long()[:, None]
    index[column_dim] = torch.tensor(
        [column_at[n] - spans[column_dim].start for n in column_part], device=device
    ).long()[None, :]
    whole = len(row_part) == len(row_at) and len(column_part) == len(column_at)
    held = None if whole else (torch.tensor(row_part).long()[:, None], torch.tensor(column_part).long()[None, :])
    return tuple(index), held


def _spans(weight: Tensor) -> list[range]:
    """For each dimension the indices this process holds; all of them unless FSDP2 has sharded the weight."""
    spans = [range(size) for size in weight.shape]
    mesh: Any = getattr(weight, "device_mesh", None)
    for dim, placement in enumerate(getattr(weight, "placements", ())):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise UnsupportedModel(f"a weight is placed as {placement}; MacDrop writes rows sharded by FSDP2 alone")
        span, count, rank = spans[placement.dim], mesh.size(dim), mesh.get_local_rank(dim)
        chunk = -(-len(span) // count)  # as torch.chunk cuts: all but the last are equal
        spans[placement.dim] = span[rank * chunk : (rank + 1) * chunk]
    return spans
