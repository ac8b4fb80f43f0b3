"""The model of massive weights over training, mwtool.track/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mwtool.files.scan_schema import Shape
from mwtool.files.schema import Count, Envelope, Magnitude, Positive, Strict


class TrackedRows(Strict):
    """The massive layer of one checkpoint."""

    layer: Count
    expert: Count | None
    rows: Annotated[list[Count], Field(min_length=1)]
    z: Magnitude
    dimension: Count
    value: float


class TrackedPeak(Strict):
    """The largest entry of a state in any layer before the last."""

    layer: Count
    index: Count
    value: float


class TrackedLayer(Strict):
    """One layer of one checkpoint."""

    hidden: Magnitude
    median: Magnitude
    kurtosis: Magnitude
    intermediate: Magnitude


class TrackedCheckpoint(Strict):
    """One checkpoint."""

    name: str
    revision: str | None
    step: Count | None
    fingerprint: str
    massive: TrackedRows | None
    hidden: TrackedPeak
    intermediate: TrackedPeak
    median: Magnitude
    kurtosis: Magnitude
    layers: Annotated[list[TrackedLayer], Field(min_length=1)]


class TrackSettings(Strict):
    """What every checkpoint was scanned with."""

    k: Positive
    bos: str
    magnitude: float
    ratio: float


class TrackDocument(Envelope):
    """mwtool.track/1."""

    schema_: Literal["mwtool.track/1"] = Field(alias="schema")
    shape: Shape
    settings: TrackSettings
    checkpoints: Annotated[list[TrackedCheckpoint], Field(min_length=1)]
    notes: list[str]

    @model_validator(mode="after")
    def _of_one_depth(self) -> Self:
        if any(len(one.layers) != self.shape.layers for one in self.checkpoints):
            raise ValueError(f"checkpoints with other than the {self.shape.layers} layers of the model")
        return self
