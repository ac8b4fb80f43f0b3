"""The models of evaluation documents: mwtool.eval/1 and mwtool.comparison/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mwtool.errors import BadValue
from mwtool.files.schema import LARGEST, Count, Envelope, Magnitude, Measured, Positive, Strict
from mwtool.files.text import shown
from mwtool.surgery.attack import parse_attack

Sample = Annotated[float, Field(ge=-1e30, le=1e30)]
"""One sample's value: sums of squares stay finite."""


class Options(Strict):
    """How it was measured."""

    limit: Positive | None
    protocol: Annotated[str, Field(min_length=1)] | None
    window: Annotated[int, Field(ge=2, le=LARGEST)] | None
    delimiter: str
    new_tokens: Positive
    judge: str | None = None
    compile: bool = False


class Bos(Strict):
    """The token put first."""

    id: Count
    token: str | None
    how: Literal["tokenizer", "config", "given", "none"]


class Attacked(Strict):
    """The rows that attacks take, by rank."""

    layer: Count
    expert: Count | None
    indices: list[Count]


class Place(Strict):
    """The rows an attack took in one FFN."""

    layer: Count
    expert: Count | None
    indices: list[Count]


class Measure(Strict):
    """One metric of one task with its samples."""

    task: str
    part: str | None
    metric: str
    value: float | None
    stderr: Magnitude | None
    n: Count
    nonfinite: str | None
    higher_is_better: bool
    digest: str | None
    setting: dict[str, Any]
    samples: list[Sample | None]
    weights: list[Annotated[float, Field(ge=0, le=1e15)]] | None
    answers: list[str]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.value is None and not self.nonfinite:
            raise ValueError("value is null and nonfinite does not say why")
        if None in self.samples and not self.nonfinite:
            raise ValueError("a sample is null and nonfinite does not say why")
        if self.samples and len(self.samples) != self.n:
            raise ValueError(f"{len(self.samples)} samples of {self.n}; expected as many")
        if self.weights is not None and (len(self.weights) != len(self.samples) or not sum(self.weights) > 0):
            raise ValueError(
                f"{len(self.weights)} weights that sum to {sum(self.weights)}, of {len(self.samples)} samples; "
                f"expected one a sample and a sum above 0"
            )
        return self


class Timed(Measure):
    """One metric of one task with the time it took: an entry of `baseline`."""

    seconds: Magnitude


class Figure(Timed):
    """One figure under one attack: an entry of `results`."""

    attack: str

    @field_validator("attack")
    @classmethod
    def _an_attack(cls, value: str) -> str:
        return _attack(value)


class MeanAccuracy(Strict):
    """The mean accuracy over tasks, and its change beside a reference."""

    metric: str
    tasks: Annotated[list[str], Field(min_length=2)]
    value: float
    stderr: Magnitude | None
    points: float | None
    points_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None


class Mean(MeanAccuracy):
    """The mean accuracy of a model under an attack, compared with the first. model: in a comparison."""

    model: str | None = None
    attack: str


class EvalDocument(Measured):
    """mwtool.eval/1."""

    schema_: Literal["mwtool.eval/1"] = Field(alias="schema")
    attention: str | None
    bos: Bos | None
    options: Options
    batch_size: Positive | None
    massive: Attacked | None
    places: dict[str, list[Place]] = Field(default_factory=dict)
    attacks: list[str]
    tasks: list[str]
    complete: bool
    results: list[Figure]
    means: list[Mean] = Field(default_factory=list)
    notes: list[str]

    @field_validator("attacks")
    @classmethod
    def _all_attacks(cls, values: list[str]) -> list[str]:
        return [_attack(value) for value in values]


class Beside(Strict):
    """Which figure another one is compared with."""

    model: str
    attack: str


class Pair(Strict):
    """A figure compared with the first of its kind."""

    task: str
    part: str | None
    metric: str
    model: str
    attack: str
    beside: Beside
    kind: Literal["ratio", "points", "difference"] | None
    value: float | None
    interval: Annotated[list[float | None], Field(min_length=2, max_length=2)] | None
    n: Count | None
    tied: Count | None = None


class ComparisonDocument(Envelope):
    """mwtool.comparison/1."""

    schema_: Literal["mwtool.comparison/1"] = Field(alias="schema")
    names: list[str]
    complete: bool
    pairs: list[Pair]
    means: list[Mean] = Field(default_factory=list)
    models: Annotated[list[EvalDocument], Field(min_length=1)]

    @model_validator(mode="after")
    def _a_name_each(self) -> Self:
        if len(self.names) != len(self.models):
            raise ValueError(f"{len(self.names)} names of {len(self.models)} models; expected one each")
        return self


def _attack(text: str) -> str:
    try:
        parse_attack(text)
    except BadValue as fault:
        raise ValueError(f"attack {shown(text)} is not understood") from fault
    return text
