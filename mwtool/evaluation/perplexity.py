"""Perplexity of a text that is cut into windows.

It is exp(sum of -ln p over the scored tokens / their number), so that every token has the same
weight; under the protocol `word` the sum is divided by the number of words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.evaluation.batches import Batch, Halving, batches, windows_at_once
from mwtool.evaluation.chunked_loss import Head, head_of, to_device
from mwtool.evaluation.windows import Text, Windows, protocol_named, window_for, windows
from mwtool.models.bos import find_bos

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mwtool.evaluation.compiled import Compilation


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """A perplexity with its standard error over samples (windows, or documents under `word`).

    nll: sum of -ln p of each sample. counts: tokens (or words) of each sample. stderr: None for a single sample.
    nonfinite: which samples have no finite loss; value is then NaN or infinite. seconds: time of the measurement.
    """

    value: float
    stderr: float | None
    nll: tuple[float, ...]
    counts: tuple[int, ...]
    seconds: float
    nonfinite: str | None = None
    notes: tuple[str, ...] = ()


def perplexity(
    model: Any,
    windows: Windows,
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    compiled: Compilation | None = None,
) -> Perplexity:
    """Perplexity of a causal language model in its current state, PEFT adapters and attacks included.

    batch_size: windows per batch; None: as many as give 64 MB of hidden states, fewer on a GPU with little free memory,
    on a CPU about 2,048 tokens. Batches that do not fit are halved. on_batch: called with the windows done and their
    total. compiled: the model's layers, to be used compiled. Raises BadValue for tokens outside the vocabulary,
    MwtoolError where memory does not suffice for one window, or as `Compilation.run` does.
    """
    start = time.perf_counter()
    check_vocabulary(model, windows.ids)
    device = model.get_input_embeddings().weight.device
    parts = list(batches(windows, batch_size or windows_at_once(model, windows)))
    found: list[Tensor] = []
    done, halving = 0, Halving()
    with torch.inference_mode(), nullcontext() if compiled is None else compiled.at_work():
        head = head_for(model, windows.ids[0][None].to(device), compiled)
        for batch in parts:  # results stay on the device until the last batch
            found += halving.run(batch, lambda part: [batch_sums(head, part, windows.length, device, compiled)])
            done += len(batch.windows)
            if on_batch is not None:
                on_batch(done, len(windows.ids))
        nll = per_sample(windows, parts, torch.cat(found).tolist())
    return summarize(nll, windows.units, time.perf_counter() - start, (*notes_on(head), *halving.notes))


def measure_perplexity(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str,
    *,
    protocol: str = "bos",
    window: int | None = None,
    bos: str = "auto",
    batch_size: int | None = None,
) -> Perplexity:
    """Perplexity of a model in memory on a text, as `mwtool eval --task ppl:FILE` measures it.

    protocol: a name in `mwtool.evaluation.windows.PROTOCOLS`. window: tokens in a window; None: 4096, or the number of
    positions of the model if smaller. bos: as `--bos`. batch_size: windows per batch.
    The model is run in evaluation mode and its mode is restored. Raises NoBos if the protocol needs bos and there is
    none, BadValue for an unknown protocol, a text without tokens, or tokens outside the vocabulary.
    """
    config: Any = model.config
    length, notes = window_for(config, window)
    first = None if protocol_named(protocol).bos == "never" or bos == "never" else find_bos(bos, tokenizer, config).id
    cut = windows(tokenizer, text, protocol, length, first)
    training: bool = model.training
    model.eval()
    try:
        found = perplexity(model, cut, batch_size=batch_size)
    finally:
        model.train(training)
    return replace(found, notes=(*notes, *cut.notes, *found.notes))


def check_vocabulary(model: Any, ids: Iterable[Tensor]) -> None:
    """Raises BadValue if a token id is outside the embedding table. ids: token ids of any shape, (...), each."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((int(one.max()) for one in ids), default=0)
    if largest >= rows:
        raise BadValue(
            f"the tokenizer gives token id {largest}, outside the vocabulary of {rows}; use the tokenizer of this model"
        )


def summarize(nll: Sequence[float], counts: Sequence[int], seconds: float, notes: tuple[str, ...] = ()) -> Perplexity:
    """exp(sum nll / sum counts), with the (linearized) standard error of a ratio of sums."""
    bad = [index for index, value in enumerate(nll) if not math.isfinite(value)]
    total, n = sum(counts), len(nll)
    mean = math.fsum(nll) / total if not bad else math.nan if any(map(math.isnan, nll)) else math.inf
    value = math.exp(mean) if mean < 709 else mean and math.inf  # noqa: PLR2004 # exp(710) overflows
    reason = nonfinite(bad, n)
    if math.isnan(mean):
        value = math.nan
    elif math.isinf(value) and reason is None:
        reason = f"the mean loss is {mean:.4g}, whose exponential overflows float64"
    stderr = None
    if n > 1 and reason is None:
        squares = math.fsum((one - mean * count) ** 2 for one, count in zip(nll, counts, strict=True))
        stderr = value * math.sqrt(squares * n / (n - 1)) / total
    return Perplexity(
        value=value, stderr=stderr, nll=tuple(nll), counts=tuple(counts), seconds=seconds, nonfinite=reason, notes=notes
    )


def nonfinite(bad: Sequence[int], n: int) -> str | None:
    """A sentence on which of n samples have no finite loss; None if all losses are finite."""
    return f"{len(bad)} of {n} samples have no finite loss, the first is number {bad[0]}" if bad else None


def head_for(model: Any, ids: Tensor, compiled: Compilation | None) -> Head:
    """As `head_of`, with the loss compiled as well. ids: (1, T)."""
    head = head_of(model, ids)
    return head if compiled is None else replace(head, loss=compiled.loss)


def notes_on(head: Head) -> tuple[str, ...]:
    """What the user should know about how the logits are computed."""
    return () if head.why is None else (f"{head.why}: the logits of whole windows are held in memory",)


def batch_sums(
    head: Head, batch: Batch, length: int, device: torch.device, compiled: Compilation | None = None
) -> Tensor:
    """Sum of -ln p of each window, (B,), float64. length: tokens in a whole window."""
    if compiled is not None:
        return compiled.run(batch, lambda: batch_sums(head, batch, length, device))
    losses = head.losses(batch.ids, batch.scored, length, device).double()  # (N,)
    owner = to_device(batch.scored.nonzero()[:, 0], losses.device)
    return torch.zeros(len(batch.ids), dtype=torch.float64, device=losses.device).index_add_(0, owner, losses)


def per_sample(windows: Windows, parts: Sequence[Batch], sums: Sequence[float]) -> list[float]:
    """Sum of -ln p of each sample. sums: of each window, in the order of the batches."""
    of_window = dict(zip([number for batch in parts for number in batch.windows], sums, strict=True))
    nll = [0.0] * len(windows.units)
    for number, sample in enumerate(windows.sample):
        nll[sample] += of_window[number]
    return nll
