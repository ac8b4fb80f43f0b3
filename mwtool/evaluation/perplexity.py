"""Perplexity of a text that is cut into windows.

It is exp(sum of -ln p over the scored tokens / their number), so that every token has the same
weight; under the protocol `word` the sum is divided by the number of words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.evaluation.chunked_loss import Head, head_of, to_device
from mwtool.evaluation.windows import Text, Windows, protocol_named, window_for, windows
from mwtool.models.bos import find_bos

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HIDDEN, MOST = 2**26, 2**16
"""Default size of a batch: tokens whose hidden states take 64 MB, but at most 65,536 tokens."""
CACHED = 4096
"""Default size of a batch on a CPU, in bytes at one entry per token: 2,048 tokens in bfloat16, which fit its caches."""


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
) -> Perplexity:
    """Perplexity of a causal language model in its current state, PEFT adapters and attacks included.

    batch_size: windows per batch; None: as many as give 64 MB of hidden states, on a CPU about 2,048 tokens.
    on_batch: called with the windows done and their total. Raises BadValue for tokens outside the vocabulary.
    """
    start = time.perf_counter()
    check_vocabulary(model, windows.ids)
    device = model.get_input_embeddings().weight.device
    parts = list(batches(windows, batch_size or windows_at_once(model, windows)))
    found: list[Tensor] = []
    done = 0
    with torch.inference_mode():
        head = head_of(model, windows.ids[0][None].to(device))
        for batch in parts:  # results stay on the device until the last batch
            found.append(batch_sums(head, batch, windows.length, device))
            done += len(batch.windows)
            if on_batch is not None:
                on_batch(done, len(windows.ids))
        nll = per_sample(windows, parts, torch.cat(found).tolist())
    notes = () if head.why is None else (f"{head.why}: the logits of whole windows are held in memory",)
    return summarize(nll, windows.units, time.perf_counter() - start, notes)


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


def tokens_at_once(embedding: Tensor) -> int:
    """The default number of tokens in a batch. embedding: the embedding table, (V, H)."""
    if embedding.device.type == "cpu":
        return CACHED // embedding.element_size()
    return min(MOST, HIDDEN // (embedding.shape[1] * embedding.element_size()))


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


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows that are run together, padded on the right.

    windows: their indices. ids: (B, T), int64. scored: the tokens to score, (B, T) of bool. Both are on the CPU.
    """

    windows: tuple[int, ...]
    ids: Tensor
    scored: Tensor


def batches(windows: Windows, size: int) -> Iterator[Batch]:
    """Batches of `size` windows, longest first."""
    order = sorted(range(len(windows.ids)), key=lambda index: -len(windows.ids[index]))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        yield Batch(tuple(some), *padded([windows.ids[i] for i in some], [windows.scored[i] for i in some]))


def windows_at_once(model: Any, windows: Windows) -> int:
    """The default number of windows in a batch."""
    return max(1, tokens_at_once(model.get_input_embeddings().weight) // max(len(ids) for ids in windows.ids))


def batch_sums(head: Head, batch: Batch, length: int, device: torch.device) -> Tensor:
    """Sum of -ln p of each window, (B,), float64. length: tokens in a whole window."""
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


def padded(ids: list[Tensor], scored: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and which of them are scored, both (B, T)."""
    longest = max(map(len, ids))
    whole = torch.zeros(len(ids), longest, dtype=torch.long)
    counted = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, (one, last) in enumerate(zip(ids, scored, strict=True)):
        whole[row, : len(one)] = one
        counted[row, len(one) - last : len(one)] = True
    return whole, counted
