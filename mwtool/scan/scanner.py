"""Find a model's massive weights: run bos, see which layer writes the massive dimension, rank its rows.

Definitions follow the paper (Oh, Shin, Oh, "House of Cards", arXiv 2410.01866v2) with
the choices it leaves open made explicit; docs/definitions.md has them all. Layers count
from 0. h_l is the residual stream after layer l, z_l the FFN's intermediate state, w_l
what the FFN adds to the stream, all for bos at the first position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import FFN, Adapter, DecoderLayer
from mwtool.architecture.packed import packed_dtype
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import check_fit, decoder_layers, unwrapped
from mwtool.errors import BadPlugin, BadValue, UnsupportedModel
from mwtool.massive import Identity, MassiveWeights
from mwtool.models.bos import Bos, find_bos
from mwtool.models.identity import identity_of
from mwtool.models.source import Source, locate
from mwtool.models.streaming import Stream, open_stream
from mwtool.scan.capture import LayerState, SuperWeight, walk
from mwtool.scan.definitions import (
    Origin,
    attribution,
    growth,
    largest_origin,
    peak_layer,
    settled_origin,
    sun,
)
from mwtool.scan.ranking import Protected, Router, carrier, rank, routing, to_protect
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnLayer = Callable[[int, int, int], None]
"""Called after each layer with: layers done, layers in all, bytes of weights read."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a scan found. `massive` is None where the model has no massive dimension.

    settled: the layer l* where the massive dimension stands; None where it never settles.
    attribution: share of h_l*[d] that each layer's FFN wrote, for l <= l*.
    growth: (layer, value) of the largest |h_l[d]| after l*, the last layer excepted.
    sun: (layer, dimension, value) of each largest entry that passes the strict published test.
    router: how bos is routed at the massive layer; None where that layer is dense.
    """

    identity: Identity
    dtype: str
    device: str
    bos: Bos
    settings: Settings
    states: tuple[LayerState, ...]
    massive: MassiveWeights | None
    settled: int | None
    attribution: tuple[float, ...]
    growth: tuple[int, float] | None
    intermediate_peak_layer: int | None
    sun: tuple[tuple[int, int, float], ...]
    protect: tuple[Protected, ...]
    parameters: int
    notes: tuple[str, ...]
    router: Router | None = None

    @property
    def stopped(self) -> bool:
        """Whether the walk ended before the last layer because the answer had settled."""
        return len(self.states) < self.identity.layers

    @property
    def super_weights(self) -> tuple[SuperWeight, ...]:
        """Those of all layers walked, first layer first."""
        return tuple(weight for state in self.states for weight in state.super_weights)


def scan_checkpoint(
    model: str | Source = "demo",
    settings: Settings | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_layer: OnLayer | None = None,
) -> Scan:
    """Scan a checkpoint without ever loading the whole model: one decoder layer is in memory at a time.

    model: Hub id, folder, PEFT adapter folder (its base model is scanned) or ``demo``.
    dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
    Raises MwtoolError, saying what was found and expected.
    """
    settings = settings or Settings()
    source = model if isinstance(model, Source) else locate(model, revision, trust_remote_code=trust_remote_code)
    config = source.config()
    adapter = adapter_for(config.model_type)
    layers = decoder_layers(adapter, config)
    bos = find_bos(settings.bos, source.tokenizer(), config, settings.prompt)
    experts = [layer.experts.module for layer in layers if layer.experts is not None]
    paths = [layer.path for layer in layers]
    fits = partial(check_fit, adapter, layers)
    stream = open_stream(source, config, paths, dtype, device, experts=experts, check=fits)
    notes = (*source.notes, *stream.checkpoint.notes)
    if source.adapter is not None:
        notes = (
            *notes,
            f"{source.adapter} is a PEFT adapter; its base model {source.name} was scanned, without the adapter",
        )
    subject = _Subject(stream.model, layers, bos, source.name, str(adapter), source.revision, notes, stream)
    return _scan(subject, settings, on_layer)


def scan_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: Settings | None = None,
    *,
    adapter: Adapter | None = None,
) -> Scan:
    """Scan a model in memory, wrapped by PEFT or not; its weights, hooks and mode stay as they are.

    adapter: where its matrices are; by default the one installed for its model type.
    Raises UnsupportedModel where weights are packed or offloaded, so that rows cannot be read.
    """
    settings = settings or Settings()
    base = unwrapped(model)
    adapter = adapter or adapter_for(base.config.model_type)
    layers = decoder_layers(adapter, base.config)
    check_fit(adapter, layers, base)
    name: str = base.config.name_or_path or type(base).__name__
    _check_readable(name, layers, base)
    bos = find_bos(settings.bos, tokenizer, base.config, settings.prompt)
    training: bool = base.training
    base.eval()
    try:
        return _scan(_Subject(base, layers, bos, name, str(adapter)), settings)
    finally:
        base.train(training)


def _check_readable(name: str, layers: Sequence[DecoderLayer], model: PreTrainedModel) -> None:
    for index, layer in enumerate(layers):
        for ffn in _kinds([layer]):
            packed = packed_dtype(model, ffn.down)
            how = "offloaded" if ffn.down.read(model).is_meta else packed and f"quantized (packed {packed})"
            if how:
                raise UnsupportedModel(
                    f"{name} is {how} in layer {index} and cannot be scanned in memory; scan the checkpoint it was "
                    f"made of"
                )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kinds(layers: Sequence[DecoderLayer]) -> list[FFN]:
    """One FFN of each kind a layer has: a routed expert stands for all."""
    return [ffn for layer in layers for ffn in layer.ffns if not ffn.expert]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model ready to run; `stream` where its weights come from disk; `adapter`, to name it if it proves wrong."""

    model: PreTrainedModel
    layers: list[DecoderLayer]
    bos: Bos
    name: str
    adapter: str
    revision: str | None = None
    notes: tuple[str, ...] = ()
    stream: Stream | None = None


def _scan(subject: _Subject, settings: Settings, on_layer: OnLayer | None = None) -> Scan:
    model, thresholds, total = subject.model, settings.thresholds, len(subject.layers)
    largest = max(ffn.width(model) for ffn in _kinds(subject.layers))
    if not 1 <= settings.k <= largest:
        raise BadValue(
            f"k is {settings.k}; the intermediate state has {largest} entries: k must be from 1 to {largest}"
        )

    states = _walked(subject, settings, on_layer)
    origin = settled_origin(states, total, thresholds) or largest_origin(states, total, thresholds)
    massive, router, protect = (None, None, ()) if origin is None else _rows(subject, states, origin, settings.k)
    return Scan(
        identity=identity_of(subject.name, subject.revision, model.config, subject.layers, model),
        dtype=_short(model.dtype),
        device=str(model.device if subject.stream is None else subject.stream.device),
        bos=subject.bos,
        settings=settings,
        states=tuple(states),
        massive=massive,
        settled=origin.layer if origin is not None and origin.settled else None,
        attribution=attribution(states, origin),
        growth=growth(states, total, origin),
        intermediate_peak_layer=None if origin is None else peak_layer(states[: origin.layer + 1]),
        sun=tuple(sun(states, thresholds)),
        protect=protect,
        router=router,
        parameters=_parameters(subject),
        notes=(*subject.notes, *([subject.bos.note] if subject.bos.note else [])),
    )


def _walked(subject: _Subject, settings: Settings, on_layer: OnLayer | None) -> list[LayerState]:
    """What bos leaves in each layer, up to the one after which the answer has settled."""
    stream, total = subject.stream, len(subject.layers)

    def enough(states: Sequence[LayerState]) -> bool:
        return not settings.all_layers and settled_origin(states, total, settings.thresholds) is not None

    def done(state: LayerState) -> None:
        if on_layer is not None:
            on_layer(state.layer + 1, total, 0 if stream is None else stream.bytes_read)

    place = None if stream is None else stream.device
    looking: Any = {"spike": settings.thresholds.spike, "enough": enough, "device": place, "on_layer": done}
    with nullcontext(subject.model) if stream is None else stream.flowing() as running:
        try:
            return walk(running, subject.layers, subject.bos.id, **looking)
        except BadPlugin as fault:
            if str(fault).startswith(subject.adapter):  # said already: a callable of its own failed
                raise
            raise BadPlugin(f"{subject.adapter} does not describe {type(subject.model).__name__}: {fault}") from fault


def _rows(
    subject: _Subject, states: Sequence[LayerState], origin: Origin, k: int
) -> tuple[MassiveWeights, Router | None, tuple[Protected, ...]]:
    """Rank the rows of the massive layer, the one with the largest share; a streamed layer is read once more."""
    shares = attribution(states, origin)
    at = max(range(len(shares)), key=lambda index: shares[index])
    layer, part = subject.layers[at], carrier(states[at], origin.dimension)
    whole = part.intermediate.numel()
    if k > whole:
        raise BadValue(f"k is {k}; {part.ffn.module} in layer {at} has {whole} rows: k must be from 1 to {whole}")
    with nullcontext(part.ffn) if subject.stream is None else subject.stream.holding(layer, part.ffn) as held:
        massive = rank(part, held, subject.model, origin, layer=at, k=k, parameters=_parameters(subject))
    protect = to_protect(part.ffn, subject.model, massive.indices, subject.stream)
    return massive, routing(states[at], origin.dimension), protect


def _parameters(subject: _Subject) -> int:
    """All parameters, tied ones once, without those of a PEFT adapter."""
    if subject.stream is not None:
        return subject.stream.parameters
    tuners = [getattr(m, name) for m in subject.model.modules() for name in getattr(m, "adapter_layer_names", ())]
    added: int = sum(p.numel() for tuner in tuners for p in tuner.parameters())
    return subject.model.num_parameters() - added
