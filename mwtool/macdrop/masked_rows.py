"""Rows of one matrix whose entries can be dropped and restored: in the weight itself, or in its outputs.

Both work on any layout that a `WeightSlice` describes. An ordinary frozen weight is written in
place; if FSDP2 has sharded it, each process writes its shard. For a packed weight, a hook
recomputes the outputs of the rows from an unpacked copy.
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
from mwtool.macdrop.fsdp import local_index, local_tensor, matrix_shape
from mwtool.macdrop.policy import Policy

log = logging.getLogger(__name__)


def masked_rows(model: nn.Module, place: WeightSlice, rows: Sequence[int]) -> WrittenRows | RecomputedRows:
    """Rows of the matrix at `place` that can be masked, written or recomputed as its storage allows.

    model: the module whose parameters the architecture adapter names; PEFT may have wrapped layers within it.
    Raises BadValue if the rows are trained themselves, UnsupportedModel if they cannot be changed.
    """
    found = MatrixRows(model, place, rows)
    if found.ordinary:
        return WrittenRows(found)
    if found.magnitudes():
        raise UnsupportedModel(
            f"{place.param} is quantized under DoRA, whose norm reads the packed rows; use LoRA, or load it unquantized"
        )
    return RecomputedRows(found)


class MatrixRows:
    """Rows of one matrix in a model, and the modules around the matrix.

    wrappers: PEFT's layers around the matrix, outermost first. layer: the module that owns the parameter.
    Raises as `masked_rows` does.
    """

    def __init__(self, model: nn.Module, matrix: WeightSlice, rows: Sequence[int] = ()) -> None:
        path, _, self.name = matrix.param.rpartition(".")
        self.matrix, self.rows = matrix, tuple(rows)
        outer: Any = model.get_submodule(path)
        chain = [outer]
        while hasattr(chain[-1], "base_layer"):  # PEFT wraps experts once for each of their parameters
            chain.append(chain[-1].base_layer)
        *self.wrappers, self.layer = chain
        weight: Any = getattr(outer, self.name, None)  # of modules_to_save: the trained copy, which is then refused
        weight = getattr(self.layer, self.name, None) if weight is None else weight
        _check_writable(matrix.param, self.layer, weight)
        self.weight: Tensor = weight

    @property
    def ordinary(self) -> bool:
        """Whether the weight is stored as the architecture adapter describes it, and not packed."""
        return not is_packed(self.layer, self.weight)

    def magnitudes(self) -> list[Any]:
        """The DoRA magnitude vectors of all PEFT adapters on the matrix."""
        found = [getattr(wrapper, "lora_magnitude_vector", None) or {} for wrapper in self.wrappers]
        return [each[adapter] for each in found for adapter in each]

    def overlaps(self, other: MatrixRows) -> bool:
        """Whether both, of the same layer, have a row in common."""
        return self.matrix == other.matrix and bool({*self.rows} & {*other.rows})


_dropping: WeakKeyDictionary[nn.Module, list[_Rows]] = WeakKeyDictionary()
"""For each layer, the rows whose entries are currently dropped."""


class _Rows:
    """Shared by both kinds: while entries are dropped, no other engine may drop from the rows or merge into them."""

    kept: Tensor

    def __init__(self, place: MatrixRows) -> None:
        self.place, self.layer = place, place.layer
        self.policy: Policy | None = None  # set where forward passes of a reference are to see the pre-trained rows
        self.undo: list[Callable[[], None]] = []
        for other in self._others():
            log.warning("restored entries of %s that a failed step had left dropped", place.matrix.param)
            other.restore()

    @property
    def kept_bytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self.kept.numel() * self.kept.element_size()

    def restore(self) -> None:
        """Restore the rows. Does nothing if none are dropped."""
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def _claim(self) -> None:
        """Mark the rows as dropped. Raises BadValue if an adapter is merged into them or they are dropped already."""
        param = self.place.matrix.param
        if any(getattr(wrapper, "merged", False) for wrapper in self.place.wrappers):
            raise BadValue(f"a PEFT adapter is merged into {param}; call unmerge_adapter() to train with MacDrop")
        if any(self._others()):
            raise BadValue(
                f"another MacDrop is already dropping rows of {param}; use a single MacDropCallback for a model"
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
        """The copy with entries dropped. On CUDA the mask is copied asynchronously, from pinned memory."""
        here = keep.pin_memory() if self.kept.is_cuda else keep
        return self.kept * here.to(self.kept.device, non_blocking=True)


class WrittenRows(_Rows):
    """Rows of a frozen weight that are written in place. The only extra memory is a copy of them, (R, H)."""

    how = "weights"

    def __init__(self, place: MatrixRows) -> None:
        super().__init__(place)
        self.sharded: DTensor | None = None
        self.hidden: Tensor | None = None  # the masked rows during a reference's forward pass, (R, H)
        self.width = matrix_shape(place.matrix, place.weight)[1]
        self._take(self._weight())

    @property
    def gathered(self) -> bool:
        """Whether FSDP2 currently holds the gathered weight; changes take effect when it gathers the weight again."""
        return self.sharded is not None and not isinstance(getattr(self.layer, self.place.name), DTensor)

    def drop(self, keep: Tensor) -> None:
        """Zero the entries where `keep` is false and give all others their pre-trained values.

        keep: (R, H) of bool, on the CPU. If the model was moved, cast or sharded since the last step, the copy is
        taken anew. Raises BadValue if a PEFT adapter is merged into the rows or another MacDrop drops from them.
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
            if self.policy is not None and self.policy.layer is not None:
                self.undo.append(self.layer.register_forward_pre_hook(self._show_kept).remove)
                self.undo.append(self.layer.register_forward_hook(self._show_masked, always_call=True).remove)
        self._write(self._masked(keep if self.part is None else keep[self.part]))

    def _weight(self) -> Tensor:
        """The parameter to write: under FSDP2 the sharded one, even while the module holds the gathered weight."""
        weight: Tensor = getattr(self.layer, self.place.name)
        if isinstance(weight, DTensor):
            self.sharded = weight
        return weight if self.sharded is None else self.sharded

    def _take(self, weight: Tensor) -> None:
        self.state = _state(weight)
        self.index, self.part = local_index(self.place.matrix, self.place.rows, weight)
        self.kept = local_tensor(weight)[self.index].clone()  # (R, H); under FSDP2 this process's part of it

    def _write(self, values: Tensor) -> None:
        memory = local_tensor(self._weight())  # detached: Ctrl-C could leave `torch.no_grad` switched on
        memory[self.index] = values.to(memory)  # no copy unless the model was moved or cast during the step

    def _show_kept(self, _layer: nn.Module, _args: Any) -> None:
        """Before a reference's forward pass: give it the pre-trained rows.

        Through `data`, which autograd does not see: the policy's backward pass may be yet to come, and will find the
        rows as its forward pass did.
        """
        assert self.policy is not None, "without a policy there are no hooks"
        if not self.policy.absent:
            return
        if self.sharded is not None:
            raise UnsupportedModel(
                "the reference policy would see dropped rows under FSDP2; compute its log probabilities beforehand "
                "(precompute_ref_log_probs), or train with DDP"
            )
        memory = self._weight().data
        self.hidden = memory[self.index].clone()
        memory[self.index] = self.kept.to(memory)

    def _show_masked(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        """After it: drop the same entries again. Raises BadValue if a gradient was to flow through the reference."""
        if self.hidden is None:
            return
        self._weight().data[self.index] = self.hidden
        self.hidden = None
        if isinstance(output, Tensor) and output.requires_grad:
            raise BadValue(
                "a forward pass with the PEFT adapter off, inside a training step, keeps a graph; run the reference "
                "under torch.no_grad()"
            )

    def _into_state_dict(self, _layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Put the pre-trained rows into a state dict taken while entries are dropped."""
        whole = state[prefix + self.place.name].detach().clone()
        local_tensor(whole)[self.index] = self.kept
        state[prefix + self.place.name] = whole

    def _guard_norm(self, magnitude: Any) -> None:
        """Avoid 0/0: DoRA scales a row by magnitude / norm, and the norm of a row that is dropped whole is 0 if B is 0.

        Such a row is scaled by 1, so that it acts as under plain LoRA: output and gradient are the adapter's.
        Norms that PEFT caches in evaluation mode belong to other rows, so the cache is cleared now and afterwards.
        """
        _clear_norm_cache(magnitude)
        self.undo.append(partial(_clear_norm_cache, magnitude))
        if "get_weight_norm" not in vars(magnitude):  # a fused matrix comes here twice, for gate and for up
            self.undo.append(partial(vars(magnitude).pop, "get_weight_norm", None))
            magnitude.get_weight_norm = partial(_norm_or_magnitude, magnitude, magnitude.get_weight_norm)


class RecomputedRows(_Rows):
    """Rows of a quantized layer whose outputs are recomputed from an unpacked, masked copy of the rows, (R, H).

    The layer outputs what it would with these rows replaced, in the precision it computes in.
    """

    how = "outputs"
    gathered = False

    def __init__(self, place: MatrixRows) -> None:
        from peft.utils.integrations import dequantize_module_weight

        super().__init__(place)
        matrix = place.matrix
        if not type(place.weight).__module__.startswith("bitsandbytes."):  # the only library tested to unpack exactly
            raise _packed(matrix.param, place.weight)
        if getattr(getattr(place.weight, "quant_state", None), "packing_format_for_cpu", False):
            self.layer.state_dict()  # makes bitsandbytes undo the CPU layout that an evaluation may have left
        with torch.no_grad():
            whole: Tensor = dequantize_module_weight(self.layer)  # (out, in), temporary
        # bitsandbytes turns a Conv1D, which the architecture adapter describes as (in, out), into a layer of (out, in)
        shape = tuple(whole.T.shape if matrix.transposed else whole.shape)
        self.entries = torch.tensor(matrix.rows(list(place.rows), shape)[1], device=whole.device)
        self.kept = whole[self.entries].clone()
        self.width = whole.shape[1]
        self.masked: Tensor | None = None
        self.bypassed = True

    def drop(self, keep: Tensor) -> None:
        """Recompute the outputs of the rows with the entries zeroed where `keep` is false.

        keep: (R, H) of bool, on the CPU. Raises BadValue as `WrittenRows.drop` does.
        """
        if not self.undo:
            self._claim()
            self.undo.append(self.layer.register_forward_hook(self._replace).remove)
        self.masked = self._masked(keep)

    def restore(self) -> None:
        """Let the layer output its own values again."""
        if self.undo and self.bypassed:
            log.warning(
                "the hook on %s was not called during a step, so MacDrop had no effect there", self.place.matrix.param
            )
        super().restore()
        self.masked = None

    def _replace(self, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.masked is not None, "the hook is there only while entries are dropped"
        self.bypassed = False
        if self.policy is not None and self.policy.absent:
            return output
        x, bias = args[0], self.layer.bias
        precision = getattr(self.layer, "compute_dtype", None) or x.dtype
        bias = None if bias is None else bias[self.entries].to(precision)
        rows = nn.functional.linear(x.to(precision), self.masked.to(precision), bias)  # (..., R)
        return output.index_copy(-1, self.entries, rows.to(output.dtype))


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What must be unchanged for the index and the copy of the rows to remain valid."""
    return type(weight), weight.device, weight.dtype, local_tensor(weight).shape


def _clear_norm_cache(magnitude: Any) -> None:
    """Empty DoRA's cache of norms, which PEFT does whenever it enters training mode."""
    was = magnitude.training
    magnitude.train(mode=True)
    magnitude.train(mode=was)


def _norm_or_magnitude(magnitude: Any, norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    found = norm(*args, **kwargs)
    stand_in = magnitude.weight.detach().to(found)
    return torch.where(found == 0, torch.where(stand_in == 0, 1.0, stand_in), found)


def _refuse_merging(param: str, *_args: Any, **_kwargs: Any) -> None:
    raise BadValue(f"entries of {param} are dropped during this training step; merge the PEFT adapter after it")


def _check_writable(param: str, layer: nn.Module, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise UnsupportedModel(
            f"{param} is packed in a {type(layer).__name__} and not a tensor; load the model unquantized, or with "
            f"bitsandbytes"
        )
    if hasattr(weight, "ds_id"):
        raise UnsupportedModel(f"{param} is partitioned by DeepSpeed ZeRO-3; use ZeRO-2, DDP or FSDP2 with MacDrop")
    if weight.requires_grad:
        raise BadValue(
            f"{param} is trainable, and MacDrop drops entries of frozen weights; freeze it, or train a PEFT adapter"
        )
    if weight.is_meta:
        raise UnsupportedModel(
            f"{param} is offloaded, so its rows cannot be written; load the model without offloading"
        )


def _packed(param: str, weight: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"{param} holds packed {weight.dtype} weights ({type(weight).__name__}) that cannot be unpacked; load the "
        f"model unquantized, or with bitsandbytes"
    )
