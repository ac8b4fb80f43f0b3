"""The model of mwtool.reproduction/1. docs/json.md describes every key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mwtool.files.schema import Count, Envelope, Strict

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]

Over = Literal["examples", "seeds", "draws"]


class Change(Strict):
    """A cell compared with that of the line it is compared with: a ratio of perplexities, or percentage points."""

    kind: Literal["ratio", "points"]
    value: float
    interval: Interval | None
    over: Over


class Cell(Strict):
    """A perplexity, or an accuracy in percent: of one model, or the mean over seeds (geometric, of perplexities).

    seeds: of the runs; of the draws of random rows, where these are the mean.
    """

    value: float | None
    interval: Interval | None
    over: Over
    seeds: list[Count]
    values: list[float | None]
    change: Change | None
    nonfinite: str | None


class Line(Strict):
    """One line of a table: one model under one attack.

    run: settings of its fine-tuning run, None for the model itself. on: whose rows are attacked. beside: the label of
    the line that changes are relative to.
    """

    label: str
    run: dict[str, Any] | None
    attack: str
    on: Literal["base", "merged"]
    beside: str | None
    cells: dict[str, Cell | None]
    commands: list[str]


class Column(Strict):
    """One column. task: None for the mean over all zero-shot tasks."""

    name: str
    task: str | None
    metric: str
    higher_is_better: bool
    n: Count | None


class Table(Strict):
    """One table of the paper."""

    name: str
    title: str
    state: Literal["complete", "partial", "skipped"]
    columns: list[Column]
    lines: list[Line]
    notes: list[str]


class Failure(Strict):
    """A step that failed."""

    step: str
    command: str
    error: str


class ReproductionDocument(Envelope):
    """mwtool.reproduction/1."""

    schema_: Literal["mwtool.reproduction/1"] = Field(alias="schema")
    settings: dict[str, Any]
    parts: list[str] = Field(default_factory=list)
    scan: dict[str, Any] | None
    tables: list[Table]
    failures: list[Failure]
    complete: bool
    notes: list[str]
