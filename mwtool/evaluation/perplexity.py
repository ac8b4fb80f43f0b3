"""Perplexity of a text that is cut into windows.

It is exp(sum of -ln p over the scored tokens / their number), so that every token weighs the
same; under the protocol `word` the sum is divided by the number of words.
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
from mwtool.evaluation.chunked_loss import Head, head_of, sent
from mwtool.evaluation.windows import Protocol, Text, Windows, window_for, windows
from mwtool.models.bos import find_bos

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HIDDEN, MOST = 2**26, 2**16
"""What is run at once where no batch size is given: tokens whose hidden states take 64 MB, but no more than 65,536."""
CACHED = 4096
"""The same on a CPU, in bytes of one entry a token: 2048 tokens in bfloat16. Its caches hold no more."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity with its standard error, over samples (windows, or documents under `word`).

    nll: sum of -ln p of each sample; counts: its tokens (words). stderr: None for a single sample.
    nonfinite: which samples gave no number; value is then nan or inf.
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
    """Perplexity of a causal language model as it stands, adapters and attacks included.

    batch_size: windows at once; None for 64 MB of hidden states, on a CPU about 2,048 tokens.
    on_batch: called with windows done and in all. Raises BadValue for tokens the model does not have.
    """
    start = time.perf_counter()
    check_vocabulary(model, windows.ids)
    device = model.get_input_embeddings().weight.device
    parts = list(batches(windows, batch_size or windows_at_once(model, windows)))
    found: list[Tensor] = []
    done = 0
    with torch.inference_mode():
        head = head_of(model, windows.ids[0][None].to(device))
        for batch in parts:  # nothing waits for the device before the last one
            found.append(batch_sums(head, batch, windows.length, device))
            done += len(batch.windows)
            if on_batch is not None:
                on_batch(done, len(windows.ids))
        nll = per_sample(windows, parts, torch.cat(found).tolist())
    notes = () if head.why is None else (f"{head.why}: logits of whole windows are held",)
    return summarize(nll, windows.units, time.perf_counter() - start, notes)


def measure_perplexity(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str,
    *,
    protocol: Protocol = "bos",
    window: int | None = None,
    bos: str = "auto",
    batch_size: int | None = None,
) -> Perplexity:
    """Perplexity of a model in memory on a text, as `mwtool eval --task ppl:FILE` measures it.

    window: tokens in a window; None for 4096, or what the model has positions for. bos: as `--bos`.
    The model is run in evaluation mode and left in the mode it was in. Raises NoBos and BadValue.
    """
    config: Any = model.config
    length, notes = window_for(config, window)
    first = None if protocol == "sun-4096" or bos == "never" else find_bos(bos, tokenizer, config).id
    cut = windows(tokenizer, text, protocol, length, first)
    training: bool = model.training
    model.eval()
    try:
        found = perplexity(model, cut, batch_size=batch_size)
    finally:
        model.train(training)
    return replace(found, notes=(*notes, *cut.notes, *found.notes))


def tokens_at_once(embedding: Tensor) -> int:
    """How many tokens are run together, with the embedding (V, H) as the measure of the model's width."""
    if embedding.device.type == "cpu":
        return CACHED // embedding.element_size()
    return min(MOST, HIDDEN // (embedding.shape[1] * embedding.element_size()))


def check_vocabulary(model: Any, ids: Iterable[Tensor]) -> None:
    """Raise BadValue where a token has no row in the model's embedding: the tokenizer is another model's."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((int(one.max()) for one in ids), default=0)
    if largest >= rows:
        raise BadValue(f"the tokenizer gives token id {largest}, outside the vocabulary of {rows}; is it this model's?")


def summarize(nll: Sequence[float], counts: Sequence[int], seconds: float, notes: tuple[str, ...] = ()) -> Perplexity:
    """exp(sum nll / sum counts), its standard error that of a ratio of sums (linearised)."""
    bad = [index for index, value in enumerate(nll) if not math.isfinite(value)]
    total, n = sum(counts), len(nll)
    mean = math.fsum(nll) / total if not bad else math.nan if any(map(math.isnan, nll)) else math.inf
    value = math.exp(mean) if mean < 709 else mean and math.inf  # noqa: PLR2004 # e^709 is the last that is finite
    reason = nonfinite(bad, n)
    if math.isnan(mean):
        value = math.nan
    elif math.isinf(value) and reason is None:
        reason = f"the mean loss is {mean:.4g}, whose exponential is beyond float64"
    stderr = None
    if n > 1 and reason is None:
        squares = math.fsum((one - mean * count) ** 2 for one, count in zip(nll, counts, strict=True))
        stderr = value * math.sqrt(squares * n / (n - 1)) / total
    return Perplexity(value, stderr, tuple(nll), tuple(counts), seconds, reason, notes)


def nonfinite(bad: Sequence[int], n: int) -> str | None:
    """Which of n samples gave no number, in words; None where all did."""
    return f"{len(bad)} of {n} samples gave no finite loss, the first is number {bad[0]}" if bad else None


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows run together, padded on the right.

    windows: their numbers. ids: (B, T), int64; scored: which of them count, (B, T), bool; both on the CPU.
    """

    windows: tuple[int, ...]
    ids: Tensor
    scored: Tensor


def batches(windows: Windows, size: int) -> Iterator[Batch]:
    """The windows, `size` at a time, the longest first."""
    order = sorted(range(len(windows.ids)), key=lambda index: -len(windows.ids[index]))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        yield Batch(tuple(some), *_padded([windows.ids[i] for i in some], [windows.scored[i] for i in some]))


def windows_at_once(model: Any, windows: Windows) -> int:
    """How many windows are run together where no batch size is given."""
    return max(1, tokens_at_once(model.get_input_embeddings().weight) // max(len(ids) for ids in windows.ids))


def batch_sums(head: Head, batch: Batch, length: int, device: torch.device) -> Tensor:
    """Sum of -ln p of each window, (B,), float64. length: tokens in a whole window."""
    losses = head.losses(batch.ids, batch.scored, length, device).double()  # (N,)
    owner = sent(batch.scored.nonzero()[:, 0], losses.device)
    return torch.zeros(len(batch.ids), dtype=torch.float64, device=losses.device).index_add_(0, owner, losses)


def per_sample(windows: Windows, parts: Sequence[Batch], sums: Sequence[float]) -> list[float]:
    """Sum of -ln p of each sample. sums: of each window, in the order of the batches."""
    of_window = dict(zip([number for batch in parts for number in batch.windows], sums, strict=True))
    nll = [0.0] * len(windows.units)
    for number, sample in enumerate(windows.sample):
        nll[sample] += of_window[number]
    return nll


def _padded(ids: list[Tensor], scored: list[int]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right and which of them are scored, both (B, T)."""
    longest = max(map(len, ids))
    whole = torch.zeros(len(ids), longest, dtype=torch.long)
    counted = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, (one, last) in enumerate(zip(ids, scored, strict=True)):
        whole[row, : len(one)] = one
        counted[row, len(one) - last : len(one)] = True
    return whole, counted
