"""Which weights of attention a single position does without, found by running each kind of it on random weights.

Over one position the softmax of attention is 1 whatever its queries and keys are, so that most models do without them
there. Not all do: attention sinks, gates, linear attention and fused matrices need them. So nothing is assumed of a
type: a matrix is left out where any other numbers in its place give the same output, bit for bit.

The model is run from the embedding on with random numbers for what comes before attention, and nothing of the
checkpoint is read. Of every layer only the beginning runs, up to its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import DecoderLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = (1.0, 4.0)
"""Standard deviations of what random matrices give for inputs of deviation 1: one draw of all weights for each."""
BLOCK = 1_048_573
"""Random numbers are drawn once and repeated, which is much faster; a prime, so that rows of a matrix differ."""
POSITION = ("layer_idx", "layer_id", "layer_number", "block_idx")
"""What modules call their own place, by which layers of one kind differ."""
FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What models raise where they cannot be run so; then all of their weights are read."""


class _Reached(Exception):
    """The attention of a layer has been called."""


class _Stop(Exception):
    """The last layer has been called."""


class _Unclear(Exception):
    """The model is built in another way than is provided for."""


def unneeded(model: PreTrainedModel, layers: Sequence[DecoderLayer], device: torch.device) -> dict[str, list[str]]:
    """Path of a decoder layer -> names of its parameters that do not change what a single position gives.

    model: without weights, and left so. Layers in which nothing can be left out are absent, all of them where the
    model cannot be run like this.
    """
    for bare in (True, False):  # layers return a tensor, or a tuple that begins with one
        trial = _Trial(model=model, layers=layers, device=device, bare=bare)
        try:
            with trial.prepared(), torch.no_grad():
                model(input_ids=torch.tensor([[_token(model)]], device=device), use_cache=False)
        except _Stop:
            return trial.found
        except (_Unclear, *FAULTS):
            continue
    return {}


def _token(model: PreTrainedModel) -> int:
    """Any token but that of padding, over which some models warn."""
    return int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)


@dataclass(slots=True, kw_only=True)
class _Trial:
    """One forward. bare: whether layers return a tensor.

    verdicts: kind of attention, and how it is called -> what it does without. shape: of the residual stream.
    """

    model: PreTrainedModel
    layers: Sequence[DecoderLayer]
    device: torch.device
    bare: bool
    found: dict[str, list[str]] = field(default_factory=dict)
    verdicts: dict[Any, list[str]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    noise: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.noise = torch.Generator().manual_seed(0)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model with stand-ins for its layers, and for all weights that are met on the way to them."""
        handles: list[Any] = []
        replaced: list[nn.Module] = []
        try:
            attentions = []
            for index, layer in enumerate(self.layers):
                module = self.model.get_submodule(layer.path)
                attention = attention_of(module, layer)
                if attention is not None:
                    attentions.append(attention[1])
                    self._replace(attention[1], self._attending(layer.path, *attention), replaced)
                self._replace(module, self._layer(module, index, attended=attention is not None), replaced)
            inside = {id(one) for attention in attentions for one in attention.modules()}
            for module in self.model.modules():
                if id(module) not in inside and any(p.is_meta for p in module.parameters(recurse=False)):
                    handles.append(module.register_forward_pre_hook(self._fill_module))
                    handles.append(module.register_forward_hook(_empty_module))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.forward
            for module in self.model.modules():
                _empty_module(module)

    @staticmethod
    def _replace(module: nn.Module, forward: Callable[..., Any], replaced: list[nn.Module]) -> None:
        module.forward = forward
        replaced.append(module)

    def _layer(self, module: nn.Module, index: int, *, attended: bool) -> Callable[..., Any]:
        whole = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or self.shape not in (None, tuple(hidden.shape)):
                raise _Unclear
            self.shape = tuple(hidden.shape)
            passed = self._random(hidden.shape, hidden.dtype)
            if attended:
                if args:
                    args = (passed, *args[1:])
                else:
                    kwargs["hidden_states"] = passed
                try:
                    whole(*args, **kwargs)
                except _Reached:
                    pass
                else:
                    raise _Unclear
            if index == len(self.layers) - 1:
                raise _Stop
            return passed if self.bare else (passed,)

        return forward

    def _attending(self, path: str, name: str, module: nn.Module) -> Callable[..., Any]:
        whole = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = _described((args, kwargs))
            if call is not None:
                key = (_kind(module), call)
                if key not in self.verdicts:
                    self.verdicts[key] = self._without_effect(module, lambda: _tensors(whole(*args, **kwargs)))
                    for one in module.modules():
                        _empty_module(one)
                if self.verdicts[key]:
                    self.found[path] = [f"{path}.{name}.{one}" for one in self.verdicts[key]]
            raise _Reached

        return forward

    def _without_effect(self, module: nn.Module, run: Callable[[], list[Tensor]]) -> list[str]:
        """Names of matrices in whose place any numbers give the same output."""
        every = [name for name, one in module.named_parameters() if one.dim() == 2 and one.is_floating_point()]  # noqa: PLR2004 - a matrix
        idle = every
        for scale in SCALES:
            for name, parameter in list(module.named_parameters()):
                _put(module, name, self._matrix(parameter, scale))
            expected = run()
            if not all(bool(one.isfinite().all()) for one in expected):
                return []
            idle = [name for name in idle if _same(expected, _negated(module.get_parameter(name), run))]
            if not idle or len(idle) == len(every):  # an output that nothing changes proves nothing
                return []
            for other in (4 * scale, 0.0):  # all of them, at last as they are when they are left out
                for name in idle:
                    _put(module, name, self._matrix(module.get_parameter(name), other))
                if not _same(expected, run()):
                    return []
        return idle

    def _fill_module(self, module: nn.Module, args: Any) -> Any:
        """Random weights for what runs before attention; of a table of embeddings one row, which stands for all."""
        if isinstance(module, nn.Embedding) and len(args) == 1 and args[0].numel() == 1:
            module.padding_idx = None
            _put(module, "weight", self._random((1, module.embedding_dim), module.weight.dtype))
            return (torch.zeros_like(args[0]),)
        for name, parameter in list(module.named_parameters(recurse=False)):
            _put(module, name, self._matrix(parameter, 1.0))
        return None

    def _matrix(self, like: Tensor, scale: float) -> Tensor:
        """Random numbers whose products with inputs of deviation 1 have deviation `scale`.

        They take the place of those that are there: with new ones for each run, memory grows to several times theirs.
        """
        made = torch.empty(like.shape, dtype=like.dtype, device=self.device) if like.is_meta else like.detach()
        if scale == 0:
            return made.zero_()
        return self._filled(made, scale / max(like.shape[-1] if like.dim() > 1 else 1, 1) ** 0.5)

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._filled(torch.empty(tuple(shape), dtype=dtype, device=self.device), 1.0)

    def _filled(self, made: Tensor, deviation: float) -> Tensor:
        dtype = made.dtype
        block = (torch.randn(min(made.numel(), BLOCK), generator=self.noise) * deviation).to(self.device, dtype)
        flat = made.view(-1)
        for begin in range(0, flat.numel(), BLOCK):
            piece = flat[begin : begin + BLOCK]
            piece.copy_(block[: piece.numel()])
        return made


def attention_of(module: nn.Module, layer: DecoderLayer) -> tuple[str, nn.Module] | None:
    """The child of a decoder layer that is its attention, by name: the only one with matrices beside the FFNs.

    None where several have, such as a state space model beside attention, or none.
    """
    prefix = f"{layer.path}."
    ffns = {ffn.up.param.removeprefix(prefix).partition(".")[0] for ffn in layer.ffns}
    ffns |= {ffn.down.param.removeprefix(prefix).partition(".")[0] for ffn in layer.ffns}
    found = [
        (name, child)
        for name, child in module.named_children()
        if name not in ffns and sum(one.dim() > 1 for one in child.parameters()) > 1
    ]
    return found[0] if len(found) == 1 else None


def _kind(module: nn.Module) -> Any:
    """Equal for modules that compute the same, but for their weights and their place among the layers."""
    return tuple(
        (
            name,
            type(one),
            tuple(sorted((key, repr(value)) for key, value in vars(one).items() if _is_setting(key, value))),
            tuple((key, tuple(p.shape), p.dtype) for key, p in one.named_parameters(recurse=False)),
            tuple((key, tuple(b.shape), b.dtype) for key, b in one.named_buffers(recurse=False)),
        )
        for name, one in module.named_modules()
    )


def _is_setting(key: str, value: Any) -> bool:
    return key not in POSITION and isinstance(value, bool | int | float | str | tuple | None | torch.dtype)


def _described(value: Any) -> Any:
    """What a module is called with: shapes of tensors, all else as it is; None for objects that a call may change."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, tuple):
        parts = [_described(one) for one in value]
        return None if None in parts else tuple(parts)
    if isinstance(value, dict):  # keyword arguments
        parts = [_described(one) for one in value.values()]
        return None if None in parts else tuple(zip(value, parts, strict=True))
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return None


def _negated(parameter: Tensor, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a run gives with a matrix negated in place, which is undone exactly."""
    parameter.neg_()
    output = run()
    parameter.neg_()
    return output


def _same(expected: list[Tensor], output: list[Tensor]) -> bool:
    """Whether two outputs are equal bit for bit."""
    return len(output) == len(expected) and all(map(torch.equal, output, expected))


def _tensors(output: Any) -> list[Tensor]:
    """All tensors that a module returns."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        return [tensor for one in output for tensor in _tensors(one)]
    return []


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    made = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(path)._parameters[leaf] = made  # noqa: SLF001 - replaced in place, as accelerate's hooks do


def _empty_module(module: nn.Module, *_: Any) -> None:
    """Take a module's own weights away. An embedding has its size back."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            shape = tuple(parameter.shape)
            if isinstance(module, nn.Embedding) and name == "weight":
                shape = (module.num_embeddings, module.embedding_dim)
            _put(module, name, torch.empty(shape, dtype=parameter.dtype, device="meta"))


def sources(names: Mapping[str, Sequence[str]], path: str, parameters: Sequence[str]) -> dict[str, list[str]]:
    """Of these parameters of a layer, those whose tensors serve no other one -> these tensors.

    names: as of `key_mapping.TensorMap`.
    """
    prefix = f"{path}."
    others = {
        tensor
        for name, found in names.items()
        if name.startswith(prefix) and name not in parameters
        for tensor in found
    }
    held = {name: list(names.get(name, [])) for name in parameters}
    return {name: found for name, found in held.items() if found and not others.intersection(found)}
