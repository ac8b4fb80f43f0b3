"""Every setting of an evaluation, with its default. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mwtool.models.load_options import LoadOptions
from mwtool.scan.settings import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure.

    batch_size: windows, questions or prompts at once; None: as many windows as give 64 MB of hidden states, fewer on a
    GPU with little free memory (on a CPU 2,048 tokens), 16 of the others. limit: only the first so many of each task.
    protocol, window: how a text is cut (None: as the task or the model says). bos: as `--bos`; `never` is none at all.
    delimiter: between context and continuation in local files. new_tokens: the most tokens of a generated answer.
    judge: who grades the answers of `judge:FILE`: a model to load, or the `URL#MODEL` of an OpenAI-compatible server.
    compile: compile the model's layers for perplexities (torch.compile).
    """

    batch_size: int | None = None
    limit: int | None = None
    seed: int = 0
    protocol: str | None = None
    window: int | None = None
    bos: str = "auto"
    delimiter: str = " "
    new_tokens: int = 128
    judge: str | None = None
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What to evaluate.

    tasks, attacks: as the command line spells them (`ppl:demo`, `zero:5`). choice: the attacked rows; by default the
    massive ones, for which each model is scanned if an attack needs them.
    """

    tasks: tuple[str, ...] = ("ppl:demo",)
    attacks: tuple[str, ...] = ("none",)
    choice: Choice = field(default_factory=Choice)
    measuring: Options = field(default_factory=Options)
    loading: LoadOptions = field(default_factory=LoadOptions)
