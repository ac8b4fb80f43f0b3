"""Every setting of a reproduction, with its default. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mwtool.errors import BadValue, nearest
from mwtool.models.load_options import LoadOptions

SCHEMA = "mwtool.reproduction/1"
Part = Literal["scan", "table1", "figure4", "table3", "table4", "table5", "figure6", "figure7", "choices"]
PARTS: tuple[Part, ...] = get_args(Part)
"""In the order in which they are done. `choices` is what the paper leaves open, beside its own setting."""
CURRICULA = ("step", "epoch-before", "epoch-after", "exp-0.01", "exp-0.05", "exp-0.1")
P0 = (0.2, 0.5, 0.8, 1.0)
CONSTANT = (0.2, 0.5, 0.8, 0.95)
"""Of the study of scope."""
PLAIN, PAPER = "none", "step:0.8"
"""Training without MacDrop, and with the paper's setting."""
KS = (1, 3, 5, 10)
ATTACKED = (1, 3, 5)
"""k of the attacks on fine-tuned models; on tasks the paper's, 3, alone."""
ZEROED, MASSIVE = 3, 5
"""k of the paper's attack on fine-tuned models, and of MacDrop and Table 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How adapters are trained, as `mwtool finetune` takes it. data: None where nothing is trained."""

    data: str | None = None
    lr: float = 1e-4
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    effective_batch: int = 256
    max_length: int | None = None
    rank: int = 16
    alpha: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What is measured, and on how much of it.

    texts: name of a column -> what `ppl:` takes. tasks: zero-shot tasks as `mwtool eval` takes them. windows: of each
    text; window: tokens in one. limit: questions of each task. draws: random controls for each attack.
    """

    texts: dict[str, str] = field(default_factory=lambda: {name: name for name in ("wikitext2", "c4", "pg19")})
    tasks: tuple[str, ...] = ("paper",)
    windows: int | None = None
    window: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    draws: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """One study of one model.

    only: parts to do. seeds: of each fine-tuning run, from 0. curricula: of Table 5, those to do now. jobs: fine-tuning
    runs side by side, each in a process of its own. train_dtype, train_device: what is trained in and on; `loading` is
    how models are opened to be measured.
    """

    model: str
    folder: Path
    only: tuple[Part, ...] = PARTS
    seeds: int = 1
    curricula: tuple[str, ...] = CURRICULA
    jobs: int = 1
    training: Training = field(default_factory=Training)
    measuring: Measuring = field(default_factory=Measuring)
    loading: LoadOptions = field(default_factory=LoadOptions)
    train_dtype: str = "float32"

    def settings(self) -> dict[str, Any]:
        """What must stay the same for a study to be resumed; which parts, seeds and jobs may change."""
        return {
            "model": self.model,
            "revision": self.loading.revision,
            "gguf_file": self.loading.gguf_file,
            "dtype": self.loading.dtype,
            "train_dtype": self.train_dtype,
            "training": asdict(self.training),
            "measuring": {**asdict(self.measuring), "tasks": list(self.measuring.tasks)},
        }


def parts_of(names: tuple[str, ...]) -> tuple[Part, ...]:
    """Parts by their names, in their order; all if none is named. Raises BadValue for an unknown one."""
    for name in names:
        if name not in PARTS:
            raise BadValue(f"there is no part {name!r}; {nearest(name, PARTS)}")
    return tuple(one for one in PARTS if one in names) or PARTS


def texts_of(given: tuple[str, ...]) -> dict[str, str]:
    """Columns for texts written NAME=FILE, or as `ppl:` takes them. Raises BadValue for a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, target = text.partition("=")
        if not equals:
            name, target = Path(text).stem, text
        if not name or not target:
            raise BadValue(f"--texts {text!r} is not NAME=FILE; expected one such as wikitext2=wiki.test.raw")
        if name in found:
            raise BadValue(f"--texts names {name!r} twice; give each text a name of its own")
        found[name] = target
    return found
