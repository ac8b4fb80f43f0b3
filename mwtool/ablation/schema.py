"""The model of an ablation's document, mwtool.ablate/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mwtool.errors import BadValue
from mwtool.evaluation.schema import Bos, MeanAccuracy, Measure, Options, Sample
from mwtool.evaluation.schema import Place as Taken
from mwtool.files.scan_schema import Attacked, Rows, Shape
from mwtool.files.schema import Count, Magnitude, Measured, Positive, Strict, Text
from mwtool.files.text import shown
from mwtool.surgery.attack import parse_mode

Interval = Annotated[list[Magnitude | None], Field(min_length=2, max_length=2)]
"""Of a ratio."""
Control = Annotated[str, Field(pattern=r"^(norm|random:-?[0-9]{1,20})$")]


def _mode(text: str) -> str:
    try:
        parse_mode(text)
    except BadValue as fault:
        raise ValueError(f"mode {shown(text)} is not understood") from fault
    return text


def _in_order(value: float | None, interval: list[float | None] | None) -> None:
    """Raise ValueError where a value is outside its interval."""
    low, high = interval or (None, None)
    if interval is not None and value is None:
        raise ValueError(f"interval {interval} of no value; expected null")
    if value is not None and ((low is not None and low > value) or (high is not None and high < value)):
        raise ValueError(f"{value} is outside its interval {interval}")


class Rowed(Strict):
    """An attack with the rows it took, by place; mode `none`, without places: the unchanged model."""

    mode: str
    k: Count
    places: list[Taken]

    @field_validator("mode")
    @classmethod
    def _a_mode(cls, value: str) -> str:
        return value if value == "none" else _mode(value)


class Done(Rowed):
    """All that was measured under one attack."""

    metrics: list[Measure]


class Begun(Rowed):
    """The windows measured so far under one attack."""

    sums: list[Sample | None]


class Part(Strict):
    """A perplexity of which some windows are measured."""

    task: Text
    under: list[Begun]

    @model_validator(mode="after")
    def _the_same_windows(self) -> Self:
        counts = sorted({len(one.sums) for one in self.under})
        if len(counts) > 1:
            raise ValueError(f"sums of {counts[0]} and of {counts[-1]} windows; expected as many under each attack")
        return self


class Task(Strict):
    """What was measured."""

    name: Text
    task: Text
    metric: Text
    higher_is_better: bool
    n: Count
    digest: str | None
    setting: dict[str, Any]


class Place(Strict):
    """Rows of one FFN."""

    layer: Count
    module: Text
    expert: Count | None
    indices: list[Count]


class Run(Strict):
    """One attack, or a control of it."""

    mode: str
    k: Count
    control: Control | None
    layer: Count | None
    module: str | None
    expert: Count | None
    indices: list[Count] | None
    places: Annotated[list[Place], Field(min_length=1)]
    results: dict[str, float | None]
    ratio: dict[str, Magnitude | None]
    interval: dict[str, Interval | None]
    delta: dict[str, float | None]
    delta_interval: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)] | None] = Field(
        default_factory=dict
    )
    nonfinite: dict[str, str]

    @field_validator("mode")
    @classmethod
    def _a_mode(cls, value: str) -> str:
        return _mode(value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, value in self.results.items():
            if value is None and name not in self.nonfinite:
                raise ValueError(f"results.{name} is null and nonfinite does not say why")
        for name, interval in self.interval.items():
            _in_order(self.ratio.get(name), interval)
        for name, span in self.delta_interval.items():
            _in_order(self.delta.get(name), None if span is None else [*span])
        return self

    def measures(self, names: set[str]) -> None:
        """Raise ValueError where something else was measured than these tasks."""
        for key in ("results", "ratio", "interval", "delta", "delta_interval"):
            found = set(getattr(self, key))
            if found != names and (found or key != "delta_interval"):  # which older documents do not have
                raise ValueError(f"{key} is of {shown(sorted(found))}; expected the tasks, {shown(sorted(names))}")


class Verdict(Strict):
    """An attack on ranked rows compared with its controls."""

    mode: str
    k: Positive
    layer: Count | None
    expert: Count | None
    layers: Annotated[list[Count], Field(min_length=1)]
    task: Text
    ratio: Magnitude | None
    interval: Interval | None
    random: list[Magnitude | None]
    norm: Magnitude | None
    norm_shared: Count | None
    beyond: Magnitude | None
    beyond_interval: Interval | None
    text: str

    @field_validator("mode")
    @classmethod
    def _a_mode(cls, value: str) -> str:
        return _mode(value)


class Mean(MeanAccuracy):
    """The mean accuracy over tasks in a run, compared with the unchanged model, whose mode is null."""

    mode: str | None
    k: Count | None
    control: Control | None
    layers: list[Count] | None


class Said(Strict):
    """A continuation under an attack."""

    attack: str
    text: str


class AblateDocument(Measured):
    """mwtool.ablate/1."""

    schema_: Literal["mwtool.ablate/1"] = Field(alias="schema")
    shape: Shape
    massive: Rows | None
    attention: str | None
    bos: Bos | None
    options: Options
    batch_size: Positive | None
    events: list[Attacked]
    tasks: list[Task]
    baseline: dict[str, float | None]
    nonfinite: dict[str, str]
    runs: list[Run]
    means: list[Mean] = Field(default_factory=list)
    verdicts: list[Verdict]
    generated: list[Said]
    saved: str | None
    complete: bool
    measured: list[Done]
    part: Part | None
    notes: list[str]

    @model_validator(mode="after")
    def _of_one_piece(self) -> Self:
        for rows in (self.massive, *(one.rows for one in self.events)):
            if rows is not None:
                rows.within(self.shape)
        if self.complete and not self.tasks:
            raise ValueError("complete, and tasks is empty")
        names = {one.name for one in self.tasks}
        if len(names) < len(self.tasks) or set(self.baseline) != names:
            raise ValueError(f"baseline is of {shown(sorted(self.baseline))}; expected one value for each task")
        for run in self.runs:
            run.measures(names)
            for place in run.places:
                if place.layer >= self.shape.layers:
                    raise ValueError(f"layer {place.layer} of {self.shape.layers}, counted from 0")
        return self
