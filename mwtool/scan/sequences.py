"""Forwards over whole sequences: what each decoder layer leaves is handed on, reduced by the caller and forgotten.

No tensor of all layers is ever in memory, least of all layers x heads x T x T of attention weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import DecoderLayer
from mwtool.architecture.reference import recompute
from mwtool.errors import BadCheckpoint
from mwtool.scan.capture import submodule
from mwtool.scan.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnTensor = Callable[[int, Tensor], None]
"""Called with the number of a decoder layer, from 0, and what was captured there, in the model's dtype."""


class _Stop(Exception):
    """Ends a forward between two layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """What to capture of a forward over B sequences of T tokens.

    hidden: called after every layer with the residual stream, (B, T, H).
    attention: called in every layer that has attention weights with them, (B, heads, T, T), query before key; the
        model then computes attention eagerly.
    intermediate: called with the input of ``W_down`` at layer `at`, (B, T, I); in an MoE layer, of the routed expert
        whose weight is largest, which differs from position to position.
    last: the layer after which the forward ends; None for the model's last layer.
    """

    hidden: OnTensor | None = None
    attention: OnTensor | None = None
    intermediate: OnTensor | None = None
    at: int | None = None
    last: int | None = None


def run(subject: Subject, ids: Tensor, taps: Taps) -> None:
    """One forward over `ids`, (B, T), int64, without padding; the head is not computed.

    Raises BadCheckpoint where the residual stream is not finite, BadPlugin where the adapter proves wrong.
    """
    last = len(subject.layers) - 1 if taps.last is None else taps.last
    eager = nullcontext() if taps.attention is None else _eager(subject.model)
    layers = subject.layers[: last + 1]
    with (
        eager,
        subject.running(len(layers)) as model,
        _tapped(model, layers, ids, taps),
        torch.no_grad(),
        suppress(_Stop),
    ):
        model(input_ids=ids.to(subject.device), use_cache=False)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that computes its weights; fused kernels never have them."""
    before = model.config._attn_implementation  # noqa: SLF001 - the only place it can be read from
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _tapped(model: nn.Module, layers: list[DecoderLayer], ids: Tensor, taps: Taps) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for index, layer in enumerate(layers):
            tap = _Tap(model=model, index=index, layer=layer, taps=taps, shape=(ids.shape[0], ids.shape[1]))
            handles += tap.hooks(ends=index == len(layers) - 1)
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True, kw_only=True)
class _Tap:
    """The hooks of one decoder layer. shape: (B, T)."""

    model: nn.Module
    index: int
    layer: DecoderLayer
    taps: Taps
    shape: tuple[int, int]
    attended: bool = False
    places: list[Any] = field(default_factory=list)

    def hooks(self, *, ends: bool) -> list[Any]:
        """Registered before any hook that is there already: a streamed layer drops its weights in one."""
        decoder = submodule(self.model, self.layer.path)
        handles: list[Any] = []
        if self.taps.intermediate is not None and self.index == self.taps.at:
            handles += self._at_ffn()
        if self.taps.attention is not None:
            handles += [one.register_forward_hook(self._at_any) for one in decoder.modules() if one is not decoder]

        def at_layer(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = self._sequences(output)
            if not hidden.isfinite().all():
                raise BadCheckpoint(
                    f"the residual stream after layer {self.index} is not finite; float16 overflows above 65,504: try "
                    f"--dtype bfloat16 or float32"
                )
            if self.taps.hidden is not None:
                self.taps.hidden(self.index, hidden)
            if ends:
                raise _Stop

        return [*handles, decoder.register_forward_hook(at_layer, prepend=True)]

    def _at_any(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """The attention weights are the only output of a module that is square in T and holds shares."""
        if self.attended or not isinstance(output, tuple):
            return
        for one in output[1:]:
            if isinstance(one, Tensor) and self._is_attention(one):
                self.attended = True
                assert self.taps.attention is not None
                self.taps.attention(self.index, one.detach())
                return

    def _is_attention(self, tensor: Tensor) -> bool:
        batch, length = self.shape
        if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, length, length):  # noqa: PLR2004 - B, heads, T, T
            return False
        return bool((tensor >= 0).all()) and bool((tensor.float().sum(-1) < 1.1).all())  # noqa: PLR2004 - 1, in any dtype

    def _at_ffn(self) -> list[Any]:
        taken = self.taps.intermediate
        assert taken is not None

        def before_down(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            taken(self.index, self._sequences(args[0]))

        if self.layer.experts is None:
            hook = self.layer.ffns[0].hook
            assert hook is not None
            return [submodule(self.model, hook).register_forward_pre_hook(before_down)]

        def at_experts(_module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
            x, places, weights = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]  # (BT, H), (BT, k), (BT, k)
            chosen = places.gather(-1, weights.argmax(-1, keepdim=True))[:, 0].tolist()
            z = [recompute(self.layer.ffns[at], self.model, one)[0] for one, at in zip(x, chosen, strict=True)]
            taken(self.index, torch.stack(z).reshape(*self.shape, -1))

        return [submodule(self.model, self.layer.experts.module).register_forward_hook(at_experts, prepend=True)]

    def _sequences(self, output: Any) -> Tensor:
        """A module's output or input, (B, T, width); some modules take or give (B T, width)."""
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        return tensor.detach().reshape(*self.shape, -1)
