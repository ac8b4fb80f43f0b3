"""The model of a comparison of two scans, mwtool.compare/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mwtool.files.scan_schema import Kind, Shape
from mwtool.files.schema import Count, Envelope, Magnitude, Positive, Strict

Where = Literal["both", "a", "b"]


class ComparedRow(Strict):
    """A row that carries an event in A or B."""

    row: Count
    expert: Count | None
    fate: Literal["kept", "moved", "lost", "new"]
    rank_a: Positive | None
    rank_b: Positive | None
    z_a: Magnitude | None
    z_b: Magnitude | None
    share_a: float | None
    share_b: float | None


class ComparedEvent(Strict):
    """A layer that writes a massive dimension in A or B."""

    layer: Count
    dimension: Count
    found_in: Where
    kind_a: Kind | None
    kind_b: Kind | None
    written_a: float | None
    written_b: float | None
    after_a: float | None
    after_b: float | None
    z_a: Magnitude | None
    z_b: Magnitude | None
    rows: list[ComparedRow]


class ComparedDimension(Strict):
    """A dimension that is massive in A or B, by layer."""

    dimension: Count
    values_a: list[float] | None
    values_b: list[float] | None


class ComparedSuperWeight(Strict):
    """A super weight of A or B."""

    layer: Count
    expert: Count | None
    hidden_dim: Count
    ffn_index: Count
    found_in: Where
    value_a: float | None
    value_b: float | None


class Side(Strict):
    """One of the two scans."""

    name: str
    model: str
    revision: str | None
    model_type: str
    dtype: str
    device: str
    mwtool_version: str
    shape: Shape
    layer: Count | None
    count: Count | None
    z: Magnitude | None
    over_median: Magnitude | None
    value: float | None
    events: Count
    super_weights: Count
    peak: Magnitude | None
    peak_layer: Count | None


class CompareDocument(Envelope):
    """mwtool.compare/1."""

    schema_: Literal["mwtool.compare/1"] = Field(alias="schema")
    a: Side
    b: Side
    same_shape: bool
    events: list[ComparedEvent]
    massive: list[ComparedRow]
    dimensions: list[ComparedDimension]
    super_weights: list[ComparedSuperWeight]
    said: list[str]
    notes: list[str]
