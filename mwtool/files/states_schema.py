"""Models of what a scan document says of whole texts: states by position, attention sinks, triggers, routing.

docs/json.md describes every key. Part of mwtool.scan/2; triggers also stand alone, as mwtool.triggers/1.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mwtool.files.schema import Count, Envelope, Magnitude, Positive, Share, Strict


class Peak(Strict):
    """One entry of a state."""

    index: Count
    value: float


class StateMap(Strict):
    """A state by position: its largest entries, its median, and the largest magnitude of each part of its width."""

    top: list[list[Peak]]
    median: list[Magnitude]
    bins: list[list[Magnitude]]


class AttentionMap(Strict):
    """Mean over the heads of one layer; the weights of each query over the positions up to its own."""

    layer: Count
    weights: list[list[Magnitude]]


class Placement(Strict):
    """A text with bos in one place."""

    where: Literal["start", "middle", "end", "absent"]
    at: Count | None
    ids: Annotated[list[Count], Field(min_length=1)]
    tokens: list[str]
    hidden: StateMap
    intermediate: StateMap
    before: list[Magnitude] | None
    after: list[Magnitude] | None
    maps: list[AttentionMap]

    @model_validator(mode="after")
    def _one_entry_a_position(self) -> Self:
        states = (self.hidden, self.intermediate)
        lengths = {len(self.tokens), *(len(part) for one in states for part in (one.top, one.median, one.bins))}
        if lengths != {len(self.ids)}:
            raise ValueError(f"lists of other lengths beside {len(self.ids)} ids; expected one entry a position")
        return self


class Positions(Strict):
    """States by position."""

    text: str
    layer: Count
    placements: Annotated[list[Placement], Field(min_length=1)]


class LayerSinks(Strict):
    """Sink rates of one layer's heads."""

    layer: Count
    rate: Share
    heads: list[Share]
    scores: list[Magnitude]


class Sinks(Strict):
    """Sink rates."""

    text: str
    windows: Positive
    length: Positive
    eps: Magnitude
    rate: Share
    layers: Annotated[list[LayerSinks], Field(min_length=1)]


class TriggerDimension(Strict):
    """A dimension that is massive somewhere in the text."""

    dimension: Count
    positions: Positive


class TriggerToken(Strict):
    """A token that is massive somewhere in the text."""

    id: Count
    token: str
    seen: Positive
    massive: Positive
    first: Count
    layer: Count
    dimension: Count
    value: float


class Triggers(Strict):
    """Massive states in a text."""

    text: str
    windows: Positive
    length: Positive
    massive: Count
    first: Count
    dimensions: list[TriggerDimension]
    different: Count
    tokens: list[TriggerToken]


class Routing(Strict):
    """The router's probabilities of all experts for bos at one layer."""

    layer: Count
    probabilities: list[Share]


class TriggerDocument(Envelope):
    """mwtool.triggers/1: what others need to mask the triggers of a model."""

    schema_: Literal["mwtool.triggers/1"] = Field(alias="schema")
    magnitude: float
    ratio: float
    bos: Count | None
    triggers: Triggers
