"""How much there is to run for a task: units, tokens and forwards, and the batch that takes the most memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mwtool.evaluation.batches import batches, windows_at_once
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.generation import Prompts
from mwtool.evaluation.questions import Questions, requests_at_once
from mwtool.models.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A task in one state of the model.

    units: how many windows, questions or prompts, as `unit` calls them; None where it is not known. batches: tokens of
    each batch, padding included, in the order they run; empty where that is not known before. largest: the first of
    them as a task of its own; None likewise.
    """

    task: str
    unit: str
    units: int | None
    batches: tuple[int, ...] = ()
    largest: Prepared | None = None

    @property
    def forwards(self) -> int | None:
        """Of whole batches; the few tokens on which the output head is tried are left out. None: not known."""
        return len(self.batches) or None


def work_of(loaded: Loaded, ready: Prepared, options: Options) -> Work:
    """What a prepared task amounts to."""
    name = str(ready.task)
    if isinstance(ready, PerplexityTask):
        return _of_windows(loaded, ready, name, options)
    if isinstance(ready, Questions):
        return _of_questions(loaded, ready, name, options)
    if isinstance(ready, Prompts):
        return Work(task=name, unit="prompts", units=len(ready.texts))
    return Work(task=name, unit="questions", units=None)


def _of_windows(loaded: Loaded, ready: PerplexityTask, name: str, options: Options) -> Work:
    windows = ready.windows
    parts = list(batches(windows, options.batch_size or windows_at_once(loaded.model, windows)))
    some = parts[0].windows
    largest = replace(
        windows,
        ids=tuple(windows.ids[at] for at in some),
        scored=tuple(windows.scored[at] for at in some),
        sample=tuple(range(len(some))),
        units=tuple(windows.scored[at] for at in some),
    )
    return Work(
        task=name,
        unit="windows",
        units=len(windows.ids),
        batches=tuple(part.ids.numel() for part in parts),
        largest=replace(ready, windows=largest),
    )


def _of_questions(loaded: Loaded, ready: Questions, name: str, options: Options) -> Work:
    lengths = sorted((len(one.ids) for one in ready.requests), reverse=True)
    size = options.batch_size or requests_at_once(loaded, lengths[0])
    return Work(
        task=name,
        unit="questions",
        units=len(ready.questions),
        batches=tuple(_padded(lengths[start : start + size]) for start in range(0, len(lengths), size)),
        largest=ready.first_batch(size),
    )


def _padded(lengths: Sequence[int]) -> int:
    """Tokens of a batch with its padding. lengths: falling."""
    return len(lengths) * lengths[0]
