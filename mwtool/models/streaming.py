"""A model whose weights come and go with its forward: one decoder layer in memory at a time.

The model is built without weights, and each decoder layer reads its own
from the checkpoint when its forward begins and drops them when it ends. Renaming,
conversion, casting and dequantization are transformers' own, so a layer holds what
`from_pretrained` would have given it. Of an embedding only the rows asked for are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, DecoderLayer
from mwtool.errors import BadCheckpoint
from mwtool.models.checkpoint import Checkpoint, open_checkpoint
from mwtool.models.key_mapping import ExpertTensors, Rows, absent, tensor_map
from mwtool.models.meta_model import build
from mwtool.models.quantization import refuse_unscaled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from mwtool.models.source import Source


@dataclass
class Stream:
    """A model without weights and the checkpoint to take them from.

    names: in-memory module path of a decoder layer, or parameter name -> checkpoint names.
    experts: path of a module of routed experts -> the tensors each of its parameters is made of.
    bytes_read: bytes taken from the checkpoint so far, in the dtype they are computed in.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    layers: list[str]
    parameters: int
    device: torch.device
    load_config: Any
    names: dict[str, list[str]]
    experts: dict[str, ExpertTensors] = field(default_factory=dict)
    bytes_read: int = 0
    on_read: Callable[[int], None] | None = None
    _handles: list[Any] = field(default_factory=list)

    @contextmanager
    def flowing(self) -> Iterator[PreTrainedModel]:
        """The model, fit for a forward: weights are read as they are needed and dropped after use."""
        layers = set(self.layers)
        inside = tuple(f"{path}." for path in self.layers)
        for name, module in self.model.named_modules():
            if name in layers:
                self._hook(module, self._enter_layer(name), self._leave)
            elif name in self.experts:
                self._hook(module, self._enter_experts(name), self._leave_experts(name))
            elif not name.startswith(inside) and any(p.is_meta for p in module.parameters(recurse=False)):
                if isinstance(module, nn.Embedding) and _called_with_ids(module):
                    module.padding_idx = None  # of use in a backward only, and seldom among the few rows in memory
                    self._hook(module, self._enter_embedding(name), self._leave_embedding)
                else:
                    self._hook(module, self._enter_other(name), self._leave)
        try:
            yield self.model
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for path in self.experts:
                self._resize(path, None)
            _drop(self.model)  # an interrupted forward leaves a layer behind

    @contextmanager
    def layer(self, path: str) -> Iterator[nn.Module]:
        """One decoder layer with its weights but for routed experts, outside a forward."""
        module = self.model.get_submodule(path)
        self._load(path, module)
        try:
            yield module
        finally:
            _drop(module)

    @contextmanager
    def holding(self, layer: DecoderLayer, ffn: FFN) -> Iterator[FFN]:
        """One FFN of a decoder layer with its weights, outside a forward; gives the FFN to read them through."""
        if ffn.expert is None:
            with self.layer(layer.path):
                yield ffn
            return
        assert layer.experts is not None
        path = layer.experts.module
        self._load_experts(path, [ffn.expert])
        try:
            yield layer.ffns[0]  # the only expert in memory takes the first place
        finally:
            self._resize(path, None)

    def checkpoint_name(self, parameter: str, expert: int | None = None) -> str | None:
        """What the checkpoint calls a parameter; None where it is put together from several tensors.

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
        """For modules outside the layers with weights of their own: norms behind an embedding, projections."""

        def enter(module: nn.Module, _args: Any) -> None:
            wanted = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            self._convert(dict.fromkeys(source for parameter in wanted for source in self.names.get(parameter, [])))
            self._check(module, name)

        return enter

    def _enter_embedding(self, name: str) -> Callable[..., Any]:
        """Read the rows the ids ask for and number the ids anew: a table of 128k rows is never in memory."""

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
        """Read the experts the router chose and number them anew, as is done for an embedding's rows."""

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
        """These experts alone, in this order, in parameters as small as that."""
        module = self._resize(path, len(experts))
        self._convert(self.experts[path].of(experts))
        self._check(module, path)

    def _resize(self, path: str, count: int | None) -> nn.Module:
        """Empty an experts module and make room for `count` of its experts; None: for all, as it was built."""
        module: Any = self.model.get_submodule(path)
        total = self.experts[path].count
        for name, parameter in module._parameters.items():  # noqa: SLF001 - replaced in place, as in _drop
            shape = (total if count is None else count, *parameter.shape[1:])
            empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)  # noqa: SLF001 - likewise
        module.num_experts = shape[0]  # the kernels count tokens for each expert
        return module  # type: ignore[no-any-return] # an nn.Module whose attributes mypy does not know

    def _load(self, path: str, module: nn.Module) -> None:
        self._convert(dict.fromkeys(self.names.get(path, [])))
        self._check(module, path)

    def _convert(self, sources: Mapping[str, list[int] | None]) -> None:
        """Have transformers read, rename, convert, cast and place these tensors.

        sources: checkpoint name -> the entries to take along its first dimension, None for all.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with self.checkpoint.tensors(sources) as tensors, _no_progress_bar():
            if self.load_config.hf_quantizer is None:
                refuse_unscaled(tensors)
            lazy = {
                name: tensors[name] if rows is None else Rows(name, tensors[name], rows)
                for name, rows in sources.items()
            }
            info, _ = convert_and_load_state_dict_in_model(self.model, lazy, self.load_config)
        for name, found, expected in sorted(info.mismatched_keys):
            raise BadCheckpoint(f"tensor {name} has shape {tuple(found)}; the configuration expects {tuple(expected)}")
        for name, fault in info.conversion_errors.items():
            raise BadCheckpoint(f"tensor {name} cannot be converted: {str(fault).strip().splitlines()[-1]}")

    def _check(self, module: nn.Module, path: str) -> None:
        """Every weight is there and finite. A sum costs a hundredth of an elementwise test and shows any NaN or inf."""
        for name, tensor in module.named_parameters():
            if tensor.is_meta:
                if f"{path}.{name}".rpartition(".")[0] in self.experts:
                    continue  # read when the router has chosen
                raise BadCheckpoint(f"the checkpoint {absent(f'{path}.{name}', self.checkpoint)}")
            if not tensor.sum().isfinite() and not tensor.isfinite().all():
                raise BadCheckpoint(f"tensor {path}.{name} holds NaN or inf; the checkpoint is damaged")
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        self.bytes_read += tensor.nbytes
        if self.on_read is not None:
            self.on_read(self.bytes_read)

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
    layers: list[str],
    dtype: str = "auto",
    device: str = "cpu",
    *,
    experts: Sequence[str] = (),
    check: Callable[[PreTrainedModel], None] | None = None,
) -> Stream:
    """A model of this configuration without weights, and the way to them.

    layers: module paths of the decoder layers, as the adapter gives them; experts: those of routed experts.
    check: called with the model before the checkpoint's tensors are looked for; it raises where paths do not fit.
    Raises UnsupportedModel for a quantization that cannot be undone, BadCheckpoint for absent weights.
    """
    checkpoint = open_checkpoint(source)
    built = build(source, config, checkpoint, dtype, device, check=check)
    tensors = tensor_map(built.model, list(checkpoint.files), layers, experts, built.load_config.weight_mapping or [])
    place = torch.device(device)
    return Stream(
        built.model, checkpoint, layers, built.parameters, place, built.load_config, tensors.names, tensors.experts
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every load, which would be one for every layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _called_with_ids(embedding: nn.Embedding) -> bool:
    """Whether its forward takes token ids first; OPT's positions, for one, take a mask and are read whole."""
    name = next(iter(inspect.signature(embedding.forward).parameters))
    return name in ("input", "input_ids")


def _drop(module: nn.Module) -> None:
    """Give the memory back; the module is as it was before it was loaded."""
    for child in module.modules():
        for name, parameter in child._parameters.items():  # noqa: SLF001 - replaced in place, as accelerate's hooks do
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)  # noqa: SLF001 - likewise


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
