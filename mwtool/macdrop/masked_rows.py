"""Rows of one matrix whose entries can be dropped and put back: in the weight itself, or in what it gives.

Both ways serve any layout through its `WeightSlice`. Writing needs an ordinary frozen
weight, which may be sharded by FSDP2: each process writes what it holds. Where the weight
is packed, a hook computes the rows' outputs again from an unpacked copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mwtool.architecture.layout import WeightSlice
from mwtool.architecture.packed import is_packed
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.macdrop.fsdp import local, matrix_shape, reach

log = logging.getLogger(__name__)


def rows_of_matrix(model: nn.Module, place: WeightSlice, rows: Sequence[int]) -> WrittenRows | RecomputedRows:
    """These rows of the matrix at `place`, by the way its storage allows.

    model: the module whose parameters the adapter names; PEFT may have wrapped layers within it.
    Raises BadValue where the rows are themselves trained, UnsupportedModel where they cannot be reached.
    """
    found = Place(model, place, rows)
    if found.ordinary:
        return WrittenRows(found)
    if found.magnitudes():
        raise UnsupportedModel(
            f"{place.param} is quantized under DoRA, whose norm reads packed rows; use LoRA, or load it unquantized"
        )
    return RecomputedRows(found)


class Place:
    """Rows of one matrix in a model, and the modules around them.

    wrappers: PEFT's layers around the matrix, the outermost first; layer: the module that owns it.
    Raises as `rows_of_matrix` does.
    """

    def __init__(self, model: nn.Module, matrix: WeightSlice, rows: Sequence[int] = ()) -> None:
        path, _, self.name = matrix.param.rpartition(".")
        self.matrix, self.rows = matrix, tuple(rows)
        outer: Any = model.get_submodule(path)
        chain = [outer]
        while hasattr(chain[-1], "base_layer"):  # experts are wrapped once for each of their parameters
            chain.append(chain[-1].base_layer)
        *self.wrappers, self.layer = chain
        weight: Any = getattr(outer, self.name, None)  # a module that is saved whole is trained, and forwards its own
        weight = getattr(self.layer, self.name, None) if weight is None else weight
        _refuse(matrix.param, self.layer, weight)
        self.weight: Tensor = weight

    @property
    def ordinary(self) -> bool:
        """Whether the weight's entries lie where the adapter says."""
        return not is_packed(self.layer, self.weight)

    def magnitudes(self) -> list[Any]:
        """DoRA's, of every adapter on the matrix."""
        found = [getattr(wrapper, "lora_magnitude_vector", None) or {} for wrapper in self.wrappers]
        return [each[adapter] for each in found for adapter in each]

    def overlaps(self, other: Place) -> bool:
        """Whether both have a row in common; the layer is the same."""
        return self.matrix == other.matrix and bool({*self.rows} & {*other.rows})


_dropping: WeakKeyDictionary[nn.Module, list[_Rows]] = WeakKeyDictionary()
"""Of each layer the rows that entries are dropped from at this moment."""


class _Rows:
    """What both ways share: nobody else may drop from the rows, or merge an adapter into them, in the meantime."""

    kept: Tensor

    def __init__(self, place: Place) -> None:
        self.place, self.layer = place, place.layer
        self.undo: list[Callable[[], None]] = []
        for other in self._others():
            log.warning("%s was left with entries dropped by a step that failed; restored", place.matrix.param)
            other.restore()

    @property
    def kept_bytes(self) -> int:
        """Memory the copy takes."""
        return self.kept.numel() * self.kept.element_size()

    def restore(self) -> None:
        """Put everything back; nothing where nothing is dropped."""
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def _claim(self) -> None:
        """Raises BadValue where the rows are not the pre-trained ones, or are being dropped from already."""
        param = self.place.matrix.param
        if any(getattr(wrapper, "merged", False) for wrapper in self.place.wrappers):
            raise BadValue(f"an adapter is merged into {param}; unmerge it (unmerge_adapter) to train with MacDrop")
        if any(self._others()):
            raise BadValue(
                f"rows of {param} are being dropped by another MacDrop; give a trainer one callback for them"
            )
        claimed = _dropping.setdefault(self.layer, [])
        self.undo.append(lambda: claimed.remove(self) if self in claimed else None)
        claimed.append(self)
        for wrapper in self.place.wrappers:
            self.undo.append(partial(vars(wrapper).pop, "merge", None))
            vars(wrapper)["merge"] = partial(_refuse_merging, param)

    def _others(self) -> Iterator[_Rows]:
        for one in list(_dropping.get(self.layer, ())):
            if one is not self and one.place.overlaps(self.place):
                yield one

    def _masked(self, keep: Tensor) -> Tensor:
        """The copy with entries dropped. On CUDA nothing waits: the mask travels from pinned memory."""
        here = keep.pin_memory() if self.kept.is_cuda else keep
        return self.kept * here.to(self.kept.device, non_blocking=True)


class WrittenRows(_Rows):
    """Rows of a frozen weight, written in place. Keeps a copy of them, (R, H): the only extra memory."""

    how = "weights"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sharded: DTensor | None = None
        self.width = matrix_shape(place.matrix, place.weight)[1]
        self._take(self._weight())

    @property
    def gathered(self) -> bool:
        """Whether FSDP2 holds the weight whole at the moment: what is written shows when it is gathered again."""
        return self.sharded is not None and not isinstance(getattr(self.layer, self.place.name), DTensor)

    def drop(self, keep: Tensor) -> None:
        """Zero the entries where `keep`, (R, H) of bool on the CPU, is false; all others get their own values.

        The model may have been moved, cast or sharded since the last step: the copy is then taken again.
        Raises BadValue where an adapter is merged into the rows or another MacDrop drops from them.
        """
        if not self.undo:
            self._claim()
            weight = self._weight()
            if self.state != _state(weight):
                self._take(weight)
            self.undo.append(lambda: self._write(self.kept))
            register: Any = self.layer.register_state_dict_post_hook  # torch does not annotate it
            self.undo.append(register(partial(self._into_state_dict)).remove)  # torch marks the hook, not a method
            for magnitude in self.place.magnitudes():
                self._guard_norm(magnitude)
        self._write(self._masked(keep if self.part is None else keep[self.part]))

    def _weight(self) -> Tensor:
        """The parameter to write: under FSDP2 the sharded one, even while the module holds the gathered one."""
        weight: Tensor = getattr(self.layer, self.place.name)
        if isinstance(weight, DTensor):
            self.sharded = weight
        return weight if self.sharded is None else self.sharded

    def _take(self, weight: Tensor) -> None:
        self.state = _state(weight)
        self.index, self.part = reach(self.place.matrix, self.place.rows, weight)
        self.kept = local(weight)[self.index].clone()  # (R, H); under FSDP2 this process's part of it

    def _write(self, values: Tensor) -> None:
        memory = local(self._weight())  # detached; `no_grad` could be left on by Ctrl-C at its end
        memory[self.index] = values.to(memory)  # the same tensor, unless the model was moved or cast in a step

    def _into_state_dict(self, _layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """A state dict taken while entries are dropped holds the pre-trained weight."""
        whole = state[prefix + self.place.name].detach().clone()
        local(whole)[self.index] = self.kept
        state[prefix + self.place.name] = whole

    def _guard_norm(self, magnitude: Any) -> None:
        """DoRA scales a row by magnitude / norm: 0/0 where all of it is dropped and B is zero. Scale by 1 there.

        The row then acts as plain LoRA's would: it gives what the adapter gives, with the gradient of that.
        Norms that PEFT caches in evaluation mode are of other rows: they are forgotten now and afterwards.
        """
        _forget(magnitude)
        self.undo.append(partial(_forget, magnitude))
        if "get_weight_norm" not in vars(magnitude):  # a fused matrix is here for gate and for up
            self.undo.append(partial(vars(magnitude).pop, "get_weight_norm", None))
            magnitude.get_weight_norm = partial(_norm_or_magnitude, magnitude, magnitude.get_weight_norm)


class RecomputedRows(_Rows):
    """Rows of a quantized layer: their outputs are computed again from an unpacked, masked copy, (R, H).

    The layer gives what it would with these rows replaced, in the precision it computes in.
    """

    how = "outputs"
    gathered = False

    def __init__(self, place: Place) -> None:
        from peft.utils.integrations import dequantize_module_weight

        super().__init__(place)
        matrix = place.matrix
        if not type(place.weight).__module__.startswith("bitsandbytes."):  # what is tested to be unpacked as it acts
            raise _packed(matrix.param, place.weight)
        if getattr(getattr(place.weight, "quant_state", None), "packing_format_for_cpu", False):
            self.layer.state_dict()  # bitsandbytes then takes back the layout that an evaluation on the CPU left
        with torch.no_grad():
            whole: Tensor = dequantize_module_weight(self.layer)  # (out, in), for this moment alone
        # bitsandbytes turns a Conv1D, which the adapter describes as (in, out), into a layer of (out, in)
        shape = tuple(whole.T.shape if matrix.transposed else whole.shape)
        self.entries = torch.tensor(matrix.rows(list(place.rows), shape)[1], device=whole.device)
        self.kept = whole[self.entries].clone()
        self.width = whole.shape[1]
        self.masked: Tensor | None = None
        self.bypassed = True

    def drop(self, keep: Tensor) -> None:
        """As `WrittenRows.drop`."""
        if not self.undo:
            self._claim()
            self.undo.append(self.layer.register_forward_hook(self._replace).remove)
        self.masked = self._masked(keep)

    def restore(self) -> None:
        """Let the layer's own outputs through again."""
        if self.undo and self.bypassed:
            log.warning("%s gave no outputs in a step; what calls it bypasses MacDrop", self.place.matrix.param)
        super().restore()
        self.masked = None

    def _replace(self, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.masked is not None, "the hook is there only while entries are dropped"
        self.bypassed = False
        x, bias = args[0], self.layer.bias
        precision = getattr(self.layer, "compute_dtype", None) or x.dtype
        bias = None if bias is None else bias[self.entries].to(precision)
        rows = nn.functional.linear(x.to(precision), self.masked.to(precision), bias)  # (..., R)
        return output.index_copy(-1, self.entries, rows.to(output.dtype))


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What must be the same for an index and a copy to be of use."""
    return type(weight), weight.device, weight.dtype, local(weight).shape


def _forget(magnitude: Any) -> None:
    """Empties DoRA's cache, which PEFT does whenever it enters training mode."""
    was = magnitude.training
    magnitude.train(mode=True)
    magnitude.train(mode=was)


def _norm_or_magnitude(magnitude: Any, norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    found = norm(*args, **kwargs)
    stand_in = magnitude.weight.detach().to(found)
    return torch.where(found == 0, torch.where(stand_in == 0, 1.0, stand_in), found)


def _refuse_merging(param: str, *_args: Any, **_kwargs: Any) -> None:
    raise BadValue(f"entries of {param} are dropped for the step at hand; merge the adapter after it")


def _refuse(param: str, layer: nn.Module, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(
            f"{param} is no tensor but packed in a {type(layer).__name__}; load the model unquantized, or with "
            f"bitsandbytes"
        )
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


def _packed(param: str, weight: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"{param} holds packed {weight.dtype} weights ({type(weight).__name__}) that cannot be unpacked here; load the "
        f"model unquantized, or with bitsandbytes"
    )
