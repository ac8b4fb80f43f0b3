"""The model of what a sweep resumes from in its document, mwtool.ablate/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mwtool.evaluation.schema import Bos, Measure, Options, Place, Sample
from mwtool.files.schema import Count, Envelope, Strict


class Done(Strict):
    """All that was measured under one attack; under mode `none` of the unchanged model."""

    mode: str
    k: Count
    places: list[Place]
    metrics: list[Measure]


class Begun(Strict):
    """The windows measured so far under one attack."""

    mode: str
    k: Count
    places: list[Place]
    sums: list[Sample | None]


class Part(Strict):
    """A perplexity of which some windows are measured."""

    task: str
    under: list[Begun]


class AblateDocument(Envelope):
    """mwtool.ablate/1, as far as a sweep resumes from it."""

    schema_: Literal["mwtool.ablate/1"] = Field(alias="schema")
    adapter: str | None
    on: Literal["base", "merged"] | None
    attention: str | None
    bos: Bos | None
    options: Options
    complete: bool
    measured: list[Done]
    part: Part | None
    tasks: list[dict[str, Any]]
