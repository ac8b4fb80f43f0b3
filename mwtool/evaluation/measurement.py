"""What it takes to measure, and what comes of it: shared by everything that can be measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.perplexity import Perplexity, nonfinite
from mwtool.evaluation.tasks import Task
from mwtool.models.bos import Bos, find_bos
from mwtool.models.load import Loaded

OnProgress = Callable[[int, int], None]
"""Called with what is done of the task in hand, and of how much."""
BATCH = 16
"""Questions or prompts at once where no batch size is given."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure.

    value: nan or inf where `nonfinite` says why. stderr: standard error; None where there is none.
    n: samples: windows (documents under `word`), questions, prompts. samples: one value each: the sum of -ln p for a
    perplexity, whose denominators are `weights`; else what is averaged. digest: the same where the samples are.
    setting: what else it takes to repeat it. answers: generated texts.
    part: the sub-task where a task is a group of several; None for the whole.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    seconds: float
    samples: tuple[float, ...] = ()
    weights: tuple[float, ...] | None = None
    higher_is_better: bool = True
    nonfinite: str | None = None
    digest: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    part: str | None = None


def mean_of(metric: str, values: Sequence[float]) -> dict[str, Any]:
    """A figure that is the mean of its samples, with its standard error: fields of Measured."""
    n, bad = len(values), [index for index, value in enumerate(values) if not math.isfinite(value)]
    mean = math.nan if bad else math.fsum(values) / n
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {
        "metric": metric,
        "value": mean,
        "stderr": math.sqrt(squares / (n - 1) / n) if n > 1 and not bad else None,
        "n": n,
        "samples": tuple(values),
        "higher_is_better": True,
        "nonfinite": nonfinite(bad, n),
    }


def perplexity_of(metric: str, found: Perplexity) -> dict[str, Any]:
    """A figure that is a perplexity, with its samples: fields of Measured."""
    return {
        "metric": metric,
        "value": found.value,
        "stderr": found.stderr,
        "n": len(found.nll),
        "samples": found.nll,
        "weights": tuple(map(float, found.counts)),
        "higher_is_better": False,
        "nonfinite": found.nonfinite,
    }


def digest_of(samples: str) -> str:
    """The same where the samples, written out, are."""
    return hashlib.sha256(samples.encode()).hexdigest()[:16]


def bos_for(loaded: Loaded, options: Options) -> Bos | None:
    """The token put first, as `find_bos` finds it; None under `never`. Raises NoBos."""
    return None if options.bos == "never" else find_bos(options.bos, loaded.tokenizer, loaded.base.config)


def bos_notes(task: Task, bos: Bos | None) -> tuple[str, ...]:
    """What the user should know about the token a task puts first."""
    return (f"{task}: {bos.note}",) if bos is not None and bos.note else ()


def tokenizer_for(loaded: Loaded, task: Task) -> Any:
    """The tokenizer; raises BadValue where the model has none."""
    if loaded.tokenizer is None:
        raise BadValue(f"{loaded.source.name} has no tokenizer; {task} needs one to read text")
    return loaded.tokenizer
