"""Streaming: run a model with the weights of only one decoder layer in memory at a time.

The model is built without weights. Each decoder layer reads its weights from the checkpoint
when its forward begins and frees them when it ends. Renaming, conversion, casting and
dequantization are done by transformers, so a layer has the weights that `from_pretrained`
would load. Of an embedding, only the rows of the given token ids are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.errors import BadCheckpoint
from mwtool.models.checkpoint import Checkpoint, open_checkpoint
from mwtool.models.dequantize import DequantizedCheckpoint
from mwtool.models.fetching import Progress
from mwtool.models.key_mapping import ExpertTensors, Rows, absent, tensor_map
from mwtool.models.load_options import On
from mwtool.models.merging import Merging, open_merging
from mwtool.models.meta_model import build
from mwtool.models.quantization import as_plain, refuse_unscaled
from mwtool.models.single_position import sources, unneeded
from mwtool.models.supply import Supply, have_alone, supply

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mwtool.models.source import Source


@dataclass(kw_only=True)
class Stream:
    """A model without weights and the checkpoint they are read from.

    names: module path of a decoder layer, or parameter name -> checkpoint names.
    experts: path of a module of routed experts -> the checkpoint tensors of each of its parameters.
    left_out: path of a decoder layer -> its parameters that a single position does without -> their checkpoint names;
        None until `leave_out` has found them. They are then zeros.
    merging: the adapter that is added to the weights when they have been read.
    bytes_read: bytes read from the checkpoint so far, counted in the dtype of the computation.
    on_progress: told how far each forward is, in bytes as they are stored.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    layers: list[DecoderLayer]
    parameters: int
    device: torch.device
    load_config: Any
    names: dict[str, list[str]]
    experts: dict[str, ExpertTensors] = field(default_factory=dict)
    left_out: dict[str, dict[str, list[str]]] | None = None
    merging: Merging | None = None
    bytes_read: int = 0
    on_progress: Progress | None = None
    _supply: Supply | None = None
    _handles: list[Any] = field(default_factory=list)
    _zeros: dict[Any, Tensor] = field(default_factory=dict)

    @contextmanager
    def flowing(self, walked: int | None = None) -> Iterator[PreTrainedModel]:
        """The model, ready for a forward: weights are read when they are needed and freed after use.

        walked: how many layers the forward runs; None for all.
        """
        paths = [layer.path for layer in self.layers[:walked]]
        self._supply = supply(self.checkpoint, paths, self.tensors_of, self.on_progress)
        layers = {layer.path for layer in self.layers}
        inside = tuple(f"{path}." for path in layers)
        for name, module in self.model.named_modules():
            if name in layers:
                self._hook(module, self._enter_layer(name), self._leave)
            elif name in self.experts:
                self._hook(module, self._enter_experts(name), self._leave_experts(name))
            elif not name.startswith(inside) and any(p.is_meta for p in module.parameters(recurse=False)):
                if isinstance(module, nn.Embedding) and _called_with_ids(module):
                    module.padding_idx = None  # needed in a backward only, and rarely among the rows in memory
                    self._hook(module, self._enter_embedding(name), self._leave_embedding)
                else:
                    self._hook(module, self._enter_other(name), self._leave)
        try:
            yield self.model
        finally:
            self._supply.fetcher.stop()
            self._supply = None
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._zeros.clear()
            for path in self.experts:
                self._resize(path, None)
            _drop(self.model)  # an interrupted forward leaves a layer in memory

    def leave_out(self) -> None:
        """From now on leave out what a single position does without: no text may be run. docs/scan.md says when."""
        if self.left_out is None:
            found = {} if self.device.type == "meta" else unneeded(self.model, self.layers, self.device)
            self.left_out = {path: sources(self.names, path, names) for path, names in found.items()}

    def tensors_of(self, path: str) -> list[str]:
        """The checkpoint names read for a decoder layer, without its routed experts."""
        out = self.names_left_out(path)
        return [name for name in dict.fromkeys(self.names.get(path, [])) if name not in out]

    def names_left_out(self, path: str) -> set[str]:
        """Those that are not read although they are the layer's."""
        return {name for names in (self.left_out or {}).get(path, {}).values() for name in names}

    @contextmanager
    def layer(self, path: str) -> Iterator[nn.Module]:
        """One decoder layer with its weights, except for routed experts, outside a forward."""
        module = self.model.get_submodule(path)
        self._load(path, module)
        try:
            yield module
        finally:
            _drop(module)

    @contextmanager
    def holding(self, layer: DecoderLayer, ffn: FFN) -> Iterator[FFN]:
        """Load the weights of one FFN outside a forward; yields the FFN through which to read them."""
        if ffn.expert is None:
            with self.layer(layer.path):
                yield ffn
            return
        assert layer.experts is not None
        path = layer.experts.module
        self._load_experts(path, [ffn.expert])
        try:
            yield layer.ffns[0]  # the only expert in memory is the first
        finally:
            self._resize(path, None)

    def checkpoint_name(self, parameter: str, expert: int | None = None) -> str | None:
        """The name of a parameter in the checkpoint; None if it is assembled from several tensors.

        Of one expert's part all tensors are named, joined by " + ": gate and up are often stored apart. A GGUF
        file's tensors are named as they are there: `blk.11.ffn_up.weight`.
        """
        if expert is not None:
            names = self.experts[parameter.rpartition(".")[0]].names(parameter, expert)
            return " + ".join(map(self.checkpoint.stored_name, names)) or None
        name = self._source(parameter)
        return None if name is None else self.checkpoint.stored_name(name)

    def _source(self, parameter: str) -> str | None:
        """The one tensor that a parameter is read from; None where there are several, or none."""
        sources = self.names.get(parameter, [])
        if parameter in sources:  # beside it, the scales of packed weights
            return parameter
        return sources[0] if len(sources) == 1 else None

    def _hook(self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave))

    def _enter_layer(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, _args: Any) -> None:
            self._load(path, module)

        return enter

    def _enter_other(self, name: str) -> Callable[..., None]:
        """For modules outside the decoder layers: norms after an embedding, projections."""

        def enter(module: nn.Module, _args: Any) -> None:
            wanted = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            self._convert(dict.fromkeys(source for parameter in wanted for source in self.names.get(parameter, [])))
            self._check(module, name)
            if self.merging is not None:
                self.merging.into(name, module)

        return enter

    def _enter_embedding(self, name: str) -> Callable[..., Any]:
        """Read only the rows of the token ids and renumber the ids, so that the whole table is never in memory."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert isinstance(module, nn.Embedding)
            ids, *rest = args
            rows, renumbered = torch.unique(ids, return_inverse=True)
            shape = (module.num_embeddings, module.embedding_dim)
            module.weight = nn.Parameter(self._rows(f"{name}.weight", shape, rows.tolist()), requires_grad=False)
            return (renumbered, *rest)

        return enter

    def _rows(self, parameter: str, expected: tuple[int, int], rows: list[int]) -> Tensor:
        """Rows of an embedding table, (len(rows), H), on the device and in the dtype of the model."""
        name = self._source(parameter)
        if name is None:
            raise BadCheckpoint(f"the checkpoint {absent(parameter, self.checkpoint)}")
        with self.checkpoint.tensors([name]) as tensors:
            found = _shape(tensors[name])
            if found != expected:
                raise BadCheckpoint(f"tensor {name} has shape {found}; the configuration expects {expected}")
            refuse_unscaled(tensors)
            table = torch.cat([tensors[name][row : row + 1] for row in rows]).clone()
        if not table.isfinite().all():
            raise BadCheckpoint(f"tensor {name} holds NaN or inf in the rows read ({rows}); the checkpoint is damaged")
        self._count(table)
        return table.to(self.device, self.model.dtype)

    def _enter_experts(self, path: str) -> Callable[..., Any]:
        """Read only the experts that the router chose and renumber them, as for the rows of an embedding."""

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, *rest = args
            experts, renumbered = torch.unique(chosen, return_inverse=True)
            self._load_experts(path, experts.tolist())
            return (hidden, renumbered, *rest)

        return enter

    def _leave_experts(self, path: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._resize(path, None)

        return leave

    def _load_experts(self, path: str, experts: list[int]) -> None:
        """Load only these experts, in this order, into parameters with room for as many."""
        module = self._resize(path, len(experts))
        self._convert(self.experts[path].of(experts))
        self._check(module, path)

    def _resize(self, path: str, count: int | None) -> nn.Module:
        """Replace the parameters of an experts module by empty ones for `count` experts; None: for all of them."""
        module: Any = self.model.get_submodule(path)
        total = self.experts[path].count
        for name, parameter in module._parameters.items():  # noqa: SLF001 - replaced in place, as in _drop
            shape = (total if count is None else count, *parameter.shape[1:])
            empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)  # noqa: SLF001 - likewise
        module.num_experts = shape[0]  # the kernels count tokens for each expert
        return module  # type: ignore[no-any-return] # an nn.Module whose attributes mypy does not know

    def _load(self, path: str, module: nn.Module) -> None:
        self._convert(dict.fromkeys(self.tensors_of(path)), path)
        out = (self.left_out or {}).get(path, {})
        for name in out:
            parent, _, leaf = name.rpartition(".")
            owner, like = self.model.get_submodule(parent), self.model.get_parameter(name)
            zeros = nn.Parameter(self._zeros_like(like), requires_grad=False)
            owner._parameters[leaf] = zeros  # noqa: SLF001 - replaced in place, as in _drop
        self._check(module, path, out)
        if self.merging is not None:
            self.merging.into(path, module, without=frozenset(out))

    def _zeros_like(self, like: Tensor) -> Tensor:
        """The same for all layers: a new one for each leaves holes in the heap that the next one does not fit into."""
        key = (tuple(like.shape), like.dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
        return self._zeros[key]

    def _convert(self, sources: Mapping[str, list[int] | None], layer: str | None = None) -> None:
        """Let transformers read, rename, convert, cast and assign these tensors.

        sources: checkpoint name -> the entries to read along its first dimension, None for all.
        layer: the path of the layer they are all of.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with self.checkpoint.tensors(sources) as tensors, _no_progress_bar():
            if self.load_config.hf_quantizer is None:
                refuse_unscaled(tensors)
            lazy = {
                name: tensors[name] if rows is None else Rows(name, tensors[name], rows)
                for name, rows in sources.items()
            }
            if self._supply is None:
                have_alone(list(lazy.values()))
            else:
                self._supply.have(list(lazy.values()), layer)
            info, _ = convert_and_load_state_dict_in_model(self.model, lazy, self.load_config)
        for name, found, expected in sorted(info.mismatched_keys):
            raise BadCheckpoint(f"tensor {name} has shape {tuple(found)}; the configuration expects {tuple(expected)}")
        for name, fault in info.conversion_errors.items():
            raise BadCheckpoint(f"tensor {name} cannot be converted: {str(fault).strip().splitlines()[-1]}")

    def _check(self, module: nn.Module, path: str, left_out: Collection[str] = ()) -> None:
        """Raises BadCheckpoint if a weight is absent or not finite. A sum is 100 times faster than `isfinite`."""
        for name, tensor in module.named_parameters():
            if f"{path}.{name}" in left_out:
                continue
            if tensor.is_meta:
                if f"{path}.{name}".rpartition(".")[0] in self.experts:
                    continue  # read after the router has run
                raise BadCheckpoint(f"the checkpoint {absent(f'{path}.{name}', self.checkpoint)}")
            if not tensor.sum().isfinite() and not tensor.isfinite().all():
                raise BadCheckpoint(f"tensor {path}.{name} holds NaN or inf; the checkpoint is damaged")
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        self.bytes_read += tensor.nbytes

    @staticmethod
    def _leave(module: nn.Module, _args: Any, _output: Any) -> None:
        _drop(module)

    @staticmethod
    def _leave_embedding(module: nn.Module, _args: Any, _output: Any) -> None:
        assert isinstance(module, nn.Embedding)
        whole = torch.empty(module.num_embeddings, module.embedding_dim, dtype=module.weight.dtype, device="meta")
        module.weight = nn.Parameter(whole, requires_grad=False)


def open_stream(
    source: Source,
    config: PretrainedConfig,
    layers: Sequence[DecoderLayer],
    dtype: str = "auto",
    device: str = "cpu",
    *,
    on: On = "base",
    check: Callable[[PreTrainedModel], None] | None = None,
) -> Stream:
    """Build a model of this configuration without weights, to be streamed from its checkpoint.

    layers: those of the model, as its architecture adapter describes them.
    on: of a PEFT adapter, whether its base model is streamed, or with the adapter merged into it.
    check: called with the model before tensors are looked up in the checkpoint; raises if the paths do not fit.
    Raises UnsupportedModel for a quantization that cannot be undone, BadCheckpoint if weights are absent.
    """
    checkpoint = as_plain(open_checkpoint(source), config)
    built = build(source, config, checkpoint, dtype, device, check=check)
    paths = [layer.path for layer in layers]
    experts = [layer.experts.module for layer in layers if layer.experts is not None]
    tensors = tensor_map(built.model, list(checkpoint.files), paths, experts, built.load_config.weight_mapping or [])
    if isinstance(checkpoint, DequantizedCheckpoint):
        checkpoint.transpose_for(built.model, tensors.names)
    place = torch.device(device)
    merging = None
    if on == "merged" and source.adapter is not None:
        merging = open_merging(source, config, checkpoint, dtype, device)
    return Stream(
        model=built.model,
        checkpoint=checkpoint,
        layers=list(layers),
        parameters=built.parameters,
        device=place,
        load_config=built.load_config,
        names=tensors.names,
        experts=tensors.experts,
        merging=merging,
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disable the progress bar that transformers shows for every load, here for every layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _called_with_ids(embedding: nn.Embedding) -> bool:
    """Whether the first argument of its forward are token ids. OPT's positions take a mask and are read whole."""
    name = next(iter(inspect.signature(embedding.forward).parameters))
    return name in ("input", "input_ids")


def _drop(module: nn.Module) -> None:
    """Free the memory of the weights: the module is as before it was loaded."""
    for child in module.modules():
        for name, parameter in child._parameters.items():  # noqa: SLF001 - replaced in place, as accelerate's hooks do
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)  # noqa: SLF001 - likewise


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
