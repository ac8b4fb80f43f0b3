"""Every setting of a fine-tuning run, the paper's by default, and the steps that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mwtool.errors import BadValue
from mwtool.finetune.records import Form
from mwtool.macdrop.curriculum import Curriculum, curriculum_of
from mwtool.scan.settings import Choice

SCHEMA = "mwtool.finetune/1"
"""Of the document that a run leaves beside its adapter."""
Peft = Literal["lora", "dora"]
Quantize = Literal["4bit"]
AUTO: Literal["auto"] = "auto"
"""A batch size that is still to be found: the largest that fits into memory."""
FOUND = ("batch_size", "gradient_checkpointing", "padding_free")
"""Settings that a run finds by trials where they are not given."""
ADDED = ("group_by_length", "torch_compile", "use_liger_kernel")
"""Settings that were not set in a run of before they existed."""
PAPER_STEPS = 579
"""Optimizer steps of the paper's runs: 3 epochs of alpaca_gpt4_en, 256 examples at once."""
CHECKPOINTS = 20
"""Checkpoints that a run saves by default, at most."""
KEPT = 2
"""Checkpoints of a run that stay: one is whole while the next is written."""
FEW = 20
"""Optimizer steps below which a run is warned of: warm-up and decay then leave hardly any to learn in."""
LENGTH = 1024
"""Tokens of a sequence where neither the user nor the model says less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to train on, and where the massive rows come from.

    data: a file, a folder or a Hub dataset. form: how its records are read; None: as their keys say. split: of a
    dataset. skip_bad: leave out records that cannot be read. chat_template: the name of one of the tokenizer's
    templates, or a file; None: the tokenizer's default. date: what chat templates take for today; None: today.
    massive: a saved scan; None: the model is scanned. allow_none: train without MacDrop if there are no massive rows.
    choice: rows of other places than the massive layer; its `file` is not read, `massive` is.
    """

    data: str
    form: Form | None = None
    split: str = "train"
    skip_bad: bool = False
    chat_template: str | None = None
    date: datetime | None = None
    massive: Path | None = None
    allow_none: bool = False
    choice: Choice = field(default_factory=Choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the trained adapter, besides the model, the data and the massive rows.

    batch_size: sequences a device takes at once, `auto`: the largest number that fits; effective_batch: those of one
    optimizer step over all devices, reached by accumulation. gradient_checkpointing: recompute activations; None: only
    if nothing fits without. padding_free: put the sequences of a micro-batch behind each other in one row, without
    padding; None: on a GPU, if a trial shows that they do not see each other, and neither of the next two is set.
    group_by_length: take sequences of similar length together. torch_compile: compile the model. use_liger_kernel:
    replace parts of the model by Liger's kernels. max_length: tokens of a sequence; None:
    1024, or what the model has. max_steps: instead of epochs.
    warmup: share of the steps. target_modules: names of layers; empty: all linear layers but embeddings and head.
    eval_share: part of the sequences that is held out. dtype: what is computed in, a torch dtype's name.
    """

    curriculum: Curriculum = field(default_factory=lambda: curriculum_of("step:0.8"))
    peft: Peft = "lora"
    rank: int = 16
    alpha: int = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    lr: float = 1e-4
    warmup: float = 0.05
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int | Literal["auto"] = AUTO
    effective_batch: int = 256
    max_length: int | None = None
    packing: bool = False
    on_prompt: bool = False
    gradient_checkpointing: bool | None = None
    padding_free: bool | None = None
    group_by_length: bool = False
    torch_compile: bool = False
    use_liger_kernel: bool = False
    quantize: Quantize | None = None
    eval_share: float = 0.05
    seed: int = 0
    dtype: str = "float32"

    def with_found(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with what is still to be found by trials as an earlier run found it. settings: of that run."""
        found = {name: settings[name] for name in FOUND if getattr(self, name) in (AUTO, None) and name in settings}
        return replace(self, **found)

    def document(self) -> dict[str, Any]:
        """All settings as JSON; the curriculum as its keys in a YAML file."""
        curriculum, modules = curriculum_document(self.curriculum), list(self.target_modules)
        return {**asdict(self), "target_modules": modules, "curriculum": curriculum}

    def accumulation(self, processes: int = 1) -> int:
        """Micro-batches of one optimizer step on each device. Raises BadValue where they do not come out even.

        Of a batch size that is still to be found: those of one sequence.
        """
        at_once = self.at_once * processes
        if self.effective_batch % at_once:
            raise BadValue(
                f"an effective batch of {self.effective_batch} is no multiple of {self.at_once} sequences on "
                f"{processes} device{'s' if processes > 1 else ''}: change --effective-batch or --batch-size"
            )
        return self.effective_batch // at_once

    @property
    def wants_batches(self) -> bool:
        """Whether a setting is of use for padded batches only.

        Sequences of similar length have little padding to begin with, and a compiled model would be compiled again
        for rows of other lengths, with attention that changes between training and evaluation.
        """
        return self.group_by_length or self.torch_compile

    @property
    def at_once(self) -> int:
        """Sequences a device takes at once; 1 while that is still to be found."""
        return 1 if self.batch_size == AUTO else int(self.batch_size)

    def steps(self, sequences: int, processes: int = 1) -> tuple[int, int]:
        """Optimizer steps of the run and of one epoch, as Trainer counts them; the same for every batch size."""
        batches = math.ceil(sequences / (self.at_once * processes))
        per_epoch = math.ceil(batches / self.accumulation(processes))
        return self.max_steps or math.ceil(self.epochs * per_epoch), per_epoch


def curriculum_document(curriculum: Curriculum) -> dict[str, Any]:
    """The curriculum as the keys of its YAML file."""
    phases = [
        {"schedule": str(phase.schedule), "steps": phase.steps, "share": phase.share} for phase in curriculum.phases
    ]
    return {
        "schedule": str(curriculum),
        "phases": phases,
        "k": curriculum.k,
        "scope": curriculum.scope,
        "resample": curriculum.resample,
        "masks": curriculum.masks,
        "seed": curriculum.seed,
        **({"layers": list(curriculum.layers)} if curriculum.layers else {}),
    }
