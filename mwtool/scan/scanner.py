"""Find a model's massive weights: run bos, find the layers that write massive dimensions, rank their rows.

Definitions follow the paper (Oh, Shin, Oh, "House of Cards", arXiv 2410.01866v2) and make the choices it leaves open;
docs/definitions.md has them all. Layers count from 0. h_l is the residual stream after layer l, z_l the FFN's
intermediate state, w_l what the FFN adds to the stream, all for bos at the first position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mwtool.architecture.layout import Adapter
from mwtool.errors import BadValue
from mwtool.files.tabular import frame_of, html_of
from mwtool.massive import Identity, MassiveWeights
from mwtool.models.bos import Bos
from mwtool.models.identity import identity_of
from mwtool.models.load_options import Download, On
from mwtool.models.locate import locate
from mwtool.models.source import Source
from mwtool.scan.by_hand import ranked_by_hand
from mwtool.scan.capture import LayerState, SuperWeight, walk
from mwtool.scan.definitions import (
    Absence,
    Event,
    Trace,
    absence,
    massive_dimensions,
    massive_event,
    sun,
    traces,
    writes,
)
from mwtool.scan.positions import Positions, states_by_position
from mwtool.scan.protect import Protected
from mwtool.scan.ranking import Ranker, Router, carrier, routing
from mwtool.scan.settings import Settings
from mwtool.scan.sinks import Sinks, sink_rates
from mwtool.scan.subject import Subject, in_memory, kinds, streamed
from mwtool.scan.triggers import Triggers, find_triggers
from mwtool.scan.unread import Unread, unread

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnLayer = Callable[[int, int, int], None]
"""Called after each layer with: layers done, layers in all, bytes of weights read."""
OnBytes = Callable[[int, int], None]
"""Called with the bytes of weights that have been read or have arrived, and with about how many there are in all; of
the Hub's from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Scan:
    """The result of a scan.

    states: of each layer walked, first layer first. dimensions: each massive dimension over these layers.
    events: one for each layer that writes a large part of a massive dimension, first layer first.
    massive: the rows of the massive layer, or those chosen by hand; None where `absence` says why.
    sun: (layer, dimension, value) of each entry that passes the stricter published test.
    protect: where the rows in `massive` are stored. event_protect: the same for the rows of each event.
    router: how bos is routed at the massive layer; None where that layer is dense.
    positions, sinks, triggers: what was found on the texts of the settings; None where none was given.
    unread: weights of attention that were not read, and so not checked, since a single position does without them.
    """

    identity: Identity
    dtype: str
    device: str
    bos: Bos
    settings: Settings
    states: tuple[LayerState, ...]
    dimensions: tuple[Trace, ...]
    events: tuple[Event, ...]
    massive: MassiveWeights | None
    absence: Absence | None
    sun: tuple[tuple[int, int, float], ...]
    protect: tuple[Protected, ...]
    event_protect: tuple[tuple[Protected, ...], ...]
    parameters: int
    notes: tuple[str, ...]
    router: Router | None = None
    positions: Positions | None = None
    sinks: Sinks | None = None
    triggers: Triggers | None = None
    unread: tuple[Unread, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether the walk ended before the model's last layer."""
        return len(self.states) < self.identity.layers

    @property
    def massive_event(self) -> int | None:
        """The number of the event at the layer of `massive`; None where there is none."""
        if self.massive is None:
            return None
        return next((n for n, event in enumerate(self.events) if event.layer == self.massive.layer), None)

    @property
    def predicted(self) -> Event | None:
        """The event of the massive layer by the definitions, whatever was chosen by hand."""
        return massive_event(self.events, self.identity.layers)

    @property
    def super_weights(self) -> tuple[SuperWeight, ...]:
        """Those of all layers walked, first layer first."""
        return tuple(weight for state in self.states for weight in state.super_weights)

    def to_dict(self) -> dict[str, Any]:
        """The document of schema mwtool.scan/2, as `mwtool scan --json` prints it."""
        from mwtool.scan.document import scan_document

        return scan_document(self)

    def to_frame(self) -> Any:
        """A pandas DataFrame with one line a layer. Raises BadValue where pandas is not installed."""
        from mwtool.scan.document import layer_records

        return frame_of(layer_records(self))

    def __repr__(self) -> str:
        """One line: the model, the massive layer and its rows, and how many events there are."""
        if self.massive is None:
            found = f"massive=None, absence={self.absence!r}"
        else:
            found = f"layer={self.massive.layer}, rows={list(self.massive.indices)}"
        return f"Scan({self.identity.model!r}, {found}, events={len(self.events)}, layers={len(self.states)})"

    def _repr_html_(self) -> str:
        from mwtool.scan.document import event_records

        return html_of(repr(self), event_records(self))


def scan_checkpoint(
    model: str | Source = "demo",
    settings: Settings | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    download: Download = "auto",
    on: On = "base",
    on_layer: OnLayer | None = None,
    on_bytes: OnBytes | None = None,
) -> Scan:
    """Scan a checkpoint without ever loading the whole model: one decoder layer is in memory at a time.

    model: Hub id, folder, PEFT adapter folder, GGUF file or ``demo``.
    dtype: ``auto`` (as stored; bfloat16 for quantized GGUF), ``float32``, ``bfloat16`` or ``float16``.
    gguf_file: which GGUF file of a folder or Hub repository that holds several.
    download: of weight files on the Hub that are not in the cache, ``ranges`` fetches only what is read, ``whole`` each
    that is needed, and ``auto`` ranges where the server gives them.
    on: of a PEFT adapter, whether its base model is scanned, or with the adapter ``merged`` into it.
    Raises MwtoolError, saying what was found and expected.
    """
    settings = settings or Settings()
    source = (
        model
        if isinstance(model, Source)
        else replace(
            locate(model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file), download=download
        )
    )
    subject = streamed(source, settings, dtype, device, on)
    assert subject.stream is not None
    subject.stream.on_progress = on_bytes
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
    subject = in_memory(model, tokenizer, settings, adapter)
    training: bool = subject.model.training
    subject.model.eval()
    try:
        return _scan(subject, settings)
    finally:
        subject.model.train(training)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scan(subject: Subject, settings: Settings, on_layer: OnLayer | None = None) -> Scan:
    model, thresholds, total = subject.model, settings.thresholds, len(subject.layers)
    check(settings, subject)
    states = _walked(subject, settings, on_layer)
    ranker = Ranker(
        model=model, layers=subject.layers, stream=subject.stream, parameters=subject.parameters, k=settings.k
    )
    dimensions = massive_dimensions(states, total, thresholds)
    written = writes(states, total, dimensions, thresholds)
    events = tuple(ranker.event(states[layer], large) for layer, large in written.items())
    massive = _massive(settings, ranker, states, events, dimensions)
    texts = settings.texts
    positions = (
        None if texts.positions is None else states_by_position(subject, settings, _shown_layer(massive, states))
    )
    sinks = None if texts.sinks is None else sink_rates(subject, settings)
    triggers = None if texts.triggers is None else find_triggers(subject, settings)
    return Scan(
        identity=identity_of(subject.name, subject.revision, model.config, subject.layers, model),
        dtype=_short(model.dtype),
        device=str(subject.device),
        bos=subject.bos,
        settings=settings,
        states=tuple(states),
        dimensions=traces(states, dimensions),
        events=events,
        massive=massive,
        absence=absence(events, dimensions, total) if massive is None else None,
        sun=tuple(sun(states, thresholds)),
        protect=() if massive is None else ranker.protect(massive),
        event_protect=tuple(ranker.protect(event.rows) for event in events),
        router=None if massive is None else routing(states[massive.layer], massive.dimension),
        positions=positions,
        sinks=sinks,
        triggers=triggers,
        unread=() if subject.stream is None else unread(subject.stream, subject.layers[: len(states)]),
        parameters=ranker.parameters,
        notes=(
            *subject.notes,
            *([subject.bos.note] if subject.bos.note else []),
            *(note for one in (positions, sinks, triggers) if one is not None for note in one.notes),
        ),
    )


def _shown_layer(massive: MassiveWeights | None, states: Sequence[LayerState]) -> int:
    """The layer whose states are shown by position: the massive one, else where bos has the largest entry of h."""
    if massive is not None:
        return massive.layer
    before_last = states[:-1] or states
    return max(before_last, key=lambda state: float(state.hidden.abs().max())).layer


def check(settings: Settings, subject: Subject) -> None:
    """Refuse what can be refused before the walk. Raises BadValue."""
    total, last = len(subject.layers), settings.last_layer
    largest = max(ffn.width(subject.model) for ffn in kinds(subject.layers))
    if not 1 <= settings.k <= largest:
        raise BadValue(
            f"k is {settings.k}; the intermediate state has {largest} entries: k must be from 1 to {largest}"
        )
    if last is not None and not 0 <= last < total:
        raise BadValue(f"--layers ends at layer {last}, which does not exist; the model has layers 0 to {total - 1}")
    settings.by_hand.check(total, total - 1 if last is None else last)


def _walked(subject: Subject, settings: Settings, on_layer: OnLayer | None) -> list[LayerState]:
    """The states bos leaves in each layer, up to the last one asked for."""
    stream = subject.stream
    if stream is not None and not settings.texts.any:
        stream.leave_out()
    layers = subject.layers if settings.last_layer is None else subject.layers[: settings.last_layer + 1]

    def done(state: LayerState) -> None:
        if on_layer is not None:
            on_layer(state.layer + 1, len(layers), 0 if stream is None else stream.bytes_read)

    with subject.running(len(layers)) as running:
        return walk(
            running, layers, subject.bos.id, spike=settings.thresholds.spike, device=subject.device, on_layer=done
        )


def _massive(
    settings: Settings,
    ranker: Ranker,
    states: Sequence[LayerState],
    events: Sequence[Event],
    dimensions: Sequence[int],
) -> MassiveWeights | None:
    """The rows of the massive layer, or of what the user chose in its place."""
    found = massive_event(events, len(ranker.layers))
    if settings.by_hand:
        return ranked_by_hand(settings.by_hand, ranker, states, events=events, massive=found, dimensions=dimensions)
    if found is not None:
        ranker.check(found.rows, carrier(states[found.layer], found.dimension))
    return None if found is None else found.rows
