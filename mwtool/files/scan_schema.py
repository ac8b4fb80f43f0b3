"""The model of a scan document, mwtool.scan/2, and of what is read of mwtool.scan/1. docs/json.md describes every key.

It lies below the scan since whoever takes `--massive FILE` reads it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mwtool.files.schema import Count, Envelope, Magnitude, Positive, Seed, Share, Strict
from mwtool.files.states_schema import Positions, Routing, Sinks, Triggers

Kind = Literal["up", "down"]


class Shape(Strict):
    """Of the model that was scanned."""

    layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    experts: Positive | None


class Rows(Strict):
    """Massive weights: rows of one FFN."""

    layer: Count
    module: Annotated[str, Field(min_length=1)]
    expert: Count | None
    indices: Annotated[list[Count], Field(min_length=1)]
    magnitudes: list[Magnitude]
    shares: list[float]
    median: Magnitude
    count: Count
    share_of_parameters: Share
    dimension: Count
    value: float

    @model_validator(mode="after")
    def _lists_go_together(self) -> Self:
        if len(set(self.indices)) < len(self.indices):
            raise ValueError(f"indices {self.indices}; expected different row numbers")
        if not len(self.indices) == len(self.magnitudes) == len(self.shares):
            raise ValueError(
                f"{len(self.indices)} indices, {len(self.magnitudes)} magnitudes and {len(self.shares)} shares; "
                f"expected as many of each"
            )
        return self

    def within(self, shape: Shape) -> None:
        """Raise ValueError where layer, dimension or expert is outside the model that was scanned."""
        bounds = {"layer": shape.layers, "dimension": shape.hidden_size, "expert": shape.experts}
        for name, limit in bounds.items():
            value = getattr(self, name)
            if value is not None and (limit is None or value >= limit):
                raise ValueError(f"{name} {value} of {limit} in the model that was scanned, counted from 0")


class Places(Strict):
    """Entries of one parameter that belong to ranked rows."""

    parameter: str
    checkpoint_name: str | None
    expert: Count | None
    dim: Annotated[int, Field(ge=0, le=8)]
    indices: list[Count]


class Write(Strict):
    """What an FFN does to one massive dimension."""

    dimension: Count
    kind: Kind
    flip: bool
    written: float
    before: float
    after: float
    lives: Count | None


class Event(Write):
    """A layer that writes a large part of a massive dimension."""

    layer: Count
    others: list[Write]
    rows: Rows
    weights: list[Places]


class Trace(Strict):
    """A dimension over the layers."""

    dimension: Count
    values: list[float]
    written: list[float]


class Entry(Strict):
    """One entry of a state."""

    index: Count
    value: float


class Summary(Strict):
    """The largest entries of a state and its median."""

    top: list[Entry]
    median: Magnitude


class Layer(Strict):
    """The states of one layer."""

    layer: Count
    hidden: Summary
    intermediate: Summary


class Bos(Strict):
    """What was fed."""

    id: Count
    token: str | None
    how: Literal["tokenizer", "config", "given", "none"]


class Thresholds(Strict):
    """Those in force."""

    magnitude: float
    ratio: float
    sun_ratio: float
    spike: float


class SuperWeight(Strict):
    """An entry of a down projection."""

    layer: Count
    hidden_dim: Count
    ffn_index: Count
    value: float
    expert: Count | None


class Sun(Strict):
    """The strict published test."""

    class Place(Entry):
        """Where it is met."""

        layer: Count

    found: bool
    entries: list[Place]


class Choice(Strict):
    """One routed expert."""

    expert: Count
    probability: float
    weight: float
    share: float | None


class Router(Strict):
    """How bos is routed."""

    layer: Count
    probabilities: list[Choice]
    shared_share: float | None


class Ratio(Strict):
    """A perplexity over that of the unchanged model."""

    ratio: Magnitude
    low: Magnitude | None
    high: Magnitude | None


class Check(Strict):
    """What was measured with `--check`."""

    class Event(Strict):
        """One event attacked."""

        event: Count
        layer: Count
        indices: list[Count]
        zero: Ratio | None
        retain: Ratio | None

    class Control(Strict):
        """Random rows."""

        layer: Count
        indices: list[Count]
        zero: Ratio | None

    text: str
    k: Positive
    windows: Positive
    tokens: Positive
    dtype: str
    perplexity: Magnitude | None
    events: list[Event]
    zero_all_up: Ratio | None
    random: Control | None
    predicted: Count | None
    leans_on: Count | None
    conclusion: list[str]
    seconds: Magnitude
    notes: list[str]


class ByHand(Strict):
    """What was chosen with options instead of the massive event."""

    event: Seed | None
    layer: Count | None
    expert: Count | None
    indices: list[Count] | None


class Published(Strict):
    """The published rows and super weights of this model."""

    class Known(Strict):
        """A published super weight."""

        layer: Count
        hidden_dim: Count
        ffn_index: Count
        found: bool

    layer: Count | None
    expert: Count | None
    indices: list[Count] | None
    source: str | None
    agreement: str | None
    super_weights: list[Known]


class Scanned(Envelope):
    """What every version of a scan document has and other commands use."""

    shape: Shape
    massive: Rows | None

    @model_validator(mode="after")
    def _within_the_model(self) -> Self:
        if self.massive is not None:
            self.massive.within(self.shape)
        return self


class ScanDocument1(Scanned):
    """mwtool.scan/1: what is used of it. Its other keys had the meaning of the definitions' first edition."""

    schema_: Literal["mwtool.scan/1"] = Field(alias="schema")


class Attacked(Strict):
    """An event whose rows an ablation attacked."""

    event: Count
    kind: Kind
    rows: Rows


class AblationRows(Scanned):
    """mwtool.ablate/1: the rows of a scan that were attacked. Older files have no `shape`, `massive` or `events`."""

    schema_: Literal["mwtool.ablate/1"] = Field(alias="schema")
    massive: Rows | None = None
    events: list[Attacked] = Field(default_factory=list)

    @model_validator(mode="after")
    def _events_within_the_model(self) -> Self:
        for one in self.events:
            one.rows.within(self.shape)
        return self


class Unread(Strict):
    """A weight of attention that a single position does without."""

    parameter: str
    layers: list[Count]


class ScanDocument(Scanned):
    """mwtool.scan/2."""

    schema_: Literal["mwtool.scan/2"] = Field(alias="schema")
    parameters: Positive
    thresholds: Thresholds
    bos: Bos
    massive_event: Count | None
    absence: str | None
    by_hand: ByHand | None
    router: Router | None
    events: list[Event]
    check: Check | None
    dimensions: list[Trace]
    layers_walked: Positive
    partial: bool
    layers: list[Layer]
    super_weights: list[SuperWeight]
    weights: list[Places]
    sun: Sun
    published: Published | None
    positions: Positions | None = None  # from here to notes: absent in older files
    sinks: Sinks | None = None
    triggers: Triggers | None = None
    routing: list[Routing] | None = None
    unread: list[Unread] = Field(default_factory=list)
    notes: list[str]

    @model_validator(mode="after")
    def _events_within_the_model(self) -> Self:
        for event in self.events:
            event.rows.within(self.shape)
        if self.massive_event is not None and self.massive_event >= len(self.events):
            raise ValueError(f"massive_event {self.massive_event} of {len(self.events)} events, counted from 0")
        return self
