"""The model of a quantization check's document, mwtool.quantize-check/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mwtool.evaluation.schema import Timed
from mwtool.files.schema import Count, Magnitude, Measured, Positive, Strict
from mwtool.quantization.rounding import LEAST_BITS, MOST_BITS, Levels


class Ratio(Strict):
    """A perplexity over that of full precision, with its interval."""

    value: Magnitude | None
    low: Magnitude | None
    high: Magnitude | None


class Share(Strict):
    """The share of the cost that is given back: below 0 where protecting costs, above 1 where it gains."""

    value: float | None
    low: float | None
    high: float | None


class Variant(Strict):
    """One quantized model."""

    bits: Annotated[int, Field(ge=LEAST_BITS, le=MOST_BITS)]
    protected: str | None
    kind: str | None
    k: Positive | None
    control: bool
    kept_weights: Count
    kept_bytes: Count
    results: list[Timed]
    ratios: list[Ratio | None]
    shares_given_back: list[Share | None]

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        results, ratios, shares = len(self.results), len(self.ratios), len(self.shares_given_back)
        if not results == ratios == shares:
            raise ValueError(f"{results} results, {ratios} ratios and {shares} shares; expected as many of each")
        return self


class QuantizeDocument(Measured):
    """mwtool.quantize-check/1."""

    schema_: Literal["mwtool.quantize-check/1"] = Field(alias="schema")
    method: Literal["round to nearest"]
    group: Positive | None
    levels: Levels
    quantized_weights: Positive
    baseline: Annotated[list[Timed], Field(min_length=1)]
    variants: list[Variant]
    verdicts: list[str]
    notes: list[str]

    @model_validator(mode="after")
    def _the_same_tasks(self) -> Self:
        for one in self.variants:
            if len(one.results) != len(self.baseline):
                raise ValueError(
                    f"{len(one.results)} results of a variant; expected {len(self.baseline)}, as many as "
                    f"in full precision"
                )
        return self
