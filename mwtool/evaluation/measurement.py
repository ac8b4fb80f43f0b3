"""The result of a measurement, and what all tasks share: the tokenizer, bos, means with standard errors."""

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
"""Called with how much of the current task is done, and the total."""
BATCH = 16
"""Questions or prompts per batch if no batch size is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One metric of one task.

    value: NaN or infinite if `nonfinite` gives a reason. stderr: standard error, None if there is none.
    n: number of samples: windows (documents under `word`), questions or prompts. samples: one value for each: for a
    perplexity the sum of -ln p, with the number of units in `weights`; else the values that are averaged.
    digest: equal if the samples are the same. setting: what else is needed to reproduce the value. answers: generated
    texts. part: the subtask, if the task is a group; None for the whole task.
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
    """The mean of samples and its standard error, as fields of Measured."""
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
    """A perplexity and its samples, as fields of Measured."""
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
    """A hash of the samples, written as text."""
    return hashlib.sha256(samples.encode()).hexdigest()[:16]


def bos_for(loaded: Loaded, options: Options) -> Bos | None:
    """The token put first, as `find_bos` chooses it; None under `never`. Raises NoBos."""
    return None if options.bos == "never" else find_bos(options.bos, loaded.tokenizer, loaded.base.config)


def bos_notes(task: Task, bos: Bos | None) -> tuple[str, ...]:
    """What the user should know about the token that a task puts first."""
    return (f"{task}: {bos.note}",) if bos is not None and bos.note else ()


def tokenizer_for(loaded: Loaded, task: Task) -> Any:
    """The tokenizer. Raises BadValue if the model has none."""
    if loaded.tokenizer is None:
        raise BadValue(f"{loaded.source.name} has no tokenizer, and {task} needs one; save a tokenizer with the model")
    return loaded.tokenizer
