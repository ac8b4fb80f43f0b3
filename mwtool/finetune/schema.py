"""The models of what fine-tuning writes: mwtool.finetune/1, mwtool.finetune.plan/1 and the mark of a checkpoint.

docs/json.md describes every key of the first two.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from mwtool.files.scan_schema import Rows
from mwtool.files.schema import Count, Envelope, Magnitude, Positive, Seed, Share, Strict, Text
from mwtool.finetune.config import Peft, Quantize
from mwtool.macdrop.curriculum import Masks, Resample, Scope


class Chosen(Strict):
    """Rows that no scan ranked."""

    layer: Count
    module: Text
    expert: Count | None
    indices: Annotated[list[Count], Field(min_length=1)]


def _how_chosen(value: Any) -> str:
    ranked = isinstance(value, Rows) or (isinstance(value, dict) and "magnitudes" in value)
    return "scanned" if ranked else "chosen"


Place = Annotated[
    Annotated[Rows, Tag("scanned")] | Annotated[Chosen, Tag("chosen")],
    Discriminator(_how_chosen),
]


class Data(Strict):
    """What was trained on, and what was not."""

    class LeftOut(Strict):
        """One record."""

        record: str
        reason: Text

    name: str
    form: Literal["alpaca", "messages", "text"]
    digest: Text
    rows: Count
    trained_rows: Count
    cut: Count
    unreadable: Count
    too_long: Count
    too_short: Count
    untrained: Count
    left_out: list[LeftOut]
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")] | None
    sequences: Count
    held_out: Count
    trained_tokens: Count

    @model_validator(mode="after")
    def _sums(self) -> Self:
        parts = self.trained_rows + self.too_long + self.too_short + self.untrained
        if parts != self.rows:
            raise ValueError(f"rows is {self.rows}; expected {parts}, the sum of its parts")
        return self


class Phase(Strict):
    """A schedule over part of the run."""

    schedule: Text
    steps: Positive | None
    share: Share | None


class Curriculum(Strict):
    """How p changes, and what it applies to."""

    schedule: Text
    phases: Annotated[list[Phase], Field(min_length=1)]
    k: Positive
    scope: Scope
    resample: Resample
    masks: Masks
    seed: Seed
    layers: list[Count] = Field(default_factory=list)


class Settings(Strict):
    """Every setting of a run."""

    curriculum: Curriculum
    peft: Peft
    rank: Positive
    alpha: Positive
    dropout: Share
    target_modules: list[str]
    lr: Magnitude
    warmup: Share
    epochs: Magnitude
    max_steps: Positive | None
    batch_size: Positive | Literal["auto"]
    effective_batch: Positive
    max_length: Positive | None
    packing: bool
    on_prompt: bool
    gradient_checkpointing: bool | None
    padding_free: bool | None = None  # absent from the first documents of this schema
    group_by_length: bool = False
    torch_compile: bool = False
    use_liger_kernel: bool = False
    quantize: Quantize | None
    eval_share: Share
    seed: Seed
    dtype: Text


class Logged(Strict):
    """An entry of the log: of a training loss, or of a held-out one. What was not finite is null."""

    step: Count
    epoch: Magnitude | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: Magnitude | None = None
    grad_norm: Magnitude | None = None
    macdrop_p: Share | None = None


class Figures(Strict):
    """The figures of a run."""

    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None
    step_seconds: Magnitude | None
    macdrop_seconds: Magnitude | None = None  # documents before it came lack it


class Beginning(Envelope):
    """What a plan and what came of it share."""

    data: Data
    settings: Settings
    massive: Place | None
    places: list[Place]
    processes: Positive
    steps: Positive
    steps_per_epoch: Positive
    p: list[Share]
    notes: list[str]

    @model_validator(mode="after")
    def _p_of_every_step(self) -> Self:
        if len(self.p) not in (0, self.steps):
            raise ValueError(f"p has {len(self.p)} values for {self.steps} steps; expected one a step, or none")
        if (self.massive is None) != (not self.places):
            raise ValueError("massive is not the first of places")
        return self


class FinetuneDocument(Beginning):
    """mwtool.finetune/1."""

    schema_: Literal["mwtool.finetune/1"] = Field(alias="schema")
    how: Literal["weights", "outputs"] | None
    rows: list[Count]
    log: list[Logged]
    measured: Figures

    @model_validator(mode="after")
    def _within_the_run(self) -> Self:
        last = max((entry.step for entry in self.log), default=0)
        if last > self.steps:
            raise ValueError(f"log has step {last} of {self.steps}")
        return self


class Memory(Strict):
    """Bytes for each device, and of the process."""

    weights: Magnitude
    adapter: Magnitude
    activations: Magnitude | None
    rows: Magnitude
    total: Magnitude
    process: Count | None = None
    gpu: Magnitude | None = None


class PlanDocument(Beginning):
    """mwtool.finetune.plan/1."""

    schema_: Literal["mwtool.finetune.plan/1"] = Field(alias="schema")
    parameters: Positive
    trainable: Count
    memory: Memory
    step_seconds: Magnitude | None = None
    total_seconds: Magnitude | None = None


class File(Strict):
    """A file of a checkpoint, as it was when the checkpoint was marked."""

    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Mark(Strict):
    """mwtool.checkpoint/1: the files of a checkpoint, the settings of its run, and p of every step until then."""

    schema_: Literal["mwtool.checkpoint/1"] = Field(alias="schema")
    files: Annotated[dict[str, File], Field(min_length=1)]
    settings: dict[str, Any]
    history: dict[str, Share]

    @model_validator(mode="after")
    def _names_and_steps(self) -> Self:
        bad = next((name for name in self.files if "\\" in name or {"", ".", ".."} & set(name.split("/"))), None)
        if bad is not None:
            raise ValueError(f"files names {bad!r}; expected files of the checkpoint's folder")
        steps = sorted(int(step) if re.fullmatch(r"[1-9][0-9]{0,9}", step) else 0 for step in self.history)
        if steps and steps != list(range(1, len(steps) + 1)):
            raise ValueError("history is not of the steps from 1 on")
        return self
