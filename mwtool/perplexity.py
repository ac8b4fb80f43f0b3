"""Perplexity of a text under a named protocol: how it is cut into windows, and what is averaged.

Perplexity is exp(sum of -ln p over the scored tokens / their number), so that every token
weighs the same; under `word` the sum is divided by the number of words. Figures of
different protocols cannot be compared with each other.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mwtool.errors import BadValue, NoBos
from mwtool.head import Head, head_of, sent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Protocol = Literal["bos", "bos-4096", "sun-4096", "word"]
"""How a text becomes windows, none overlapping.

bos: bos, then length - 1 tokens; the end of the text is a shorter window. The default for files.
bos-4096: the same, and the end that does not fill a window is left out.
sun-4096: length tokens of the text and no bos, as in the paper's code (Sun et al. 2024); the end is left out.
word: every document for itself, after bos; per word and not per token, as lm-evaluation-harness does it.
"""
PROTOCOLS: tuple[Protocol, ...] = ("bos", "bos-4096", "sun-4096", "word")
LENGTH = 4096
HIDDEN, MOST = 2**26, 2**16
"""What is run at once where no batch size is given: tokens whose hidden states take 64 MB, but no more than 65,536."""
CACHED = 4096
"""The same on a CPU, in bytes of one entry a token: 2048 tokens in bfloat16. Its caches hold no more."""


@dataclass(frozen=True, slots=True)
class Text:
    """What to measure on.

    documents: joined by `joiner`, except under `word`.
    special: under `sun-4096`, whether the tokenizer adds its special tokens to the whole text once.
    most: windows the paper's code takes at most; None for all.
    """

    documents: tuple[str, ...]
    joiner: str = "\n\n"
    special: bool = False
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """A text cut up.

    ids: one tensor a window, (T,), int64. scored: how many tokens at its end count.
    sample: the sample each window belongs to: itself, or under `word` its document.
    units: tokens, under `word` words, of each sample.
    """

    ids: tuple[Tensor, ...]
    scored: tuple[int, ...]
    sample: tuple[int, ...]
    units: tuple[int, ...]
    protocol: Protocol
    length: int
    bos: int | None
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """What the result is called."""
        return "word_perplexity" if self.protocol == "word" else "perplexity"

    @property
    def digest(self) -> str:
        """The same for the same tokens scored in the same windows, whatever the model."""
        state = hashlib.sha256(repr((self.scored, self.sample, self.units)).encode())
        for ids in self.ids:
            state.update(ids.numpy().tobytes())
        return state.hexdigest()[:16]

    def first(self, samples: int | None) -> Windows:
        """The first so many samples; all for None."""
        if samples is None or samples >= len(self.units):
            return self
        count = sum(sample < samples for sample in self.sample)  # windows are in the order of their samples
        return replace(
            self,
            ids=self.ids[:count],
            scored=self.scored[:count],
            sample=self.sample[:count],
            units=self.units[:samples],
        )


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


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str,
    protocol: Protocol = "bos",
    length: int = LENGTH,
    bos_id: int | None = None,
) -> Windows:
    """Cut a text into windows of at most `length` tokens, bos included.

    Raises NoBos if the protocol needs bos and none is given, BadValue if there is nothing to score.
    """
    text = Text((text,)) if isinstance(text, str) else text
    if bos_id is None and protocol != "sun-4096":
        raise NoBos(f"protocol {protocol} puts bos first and none was given; name it with --bos, or use sun-4096")
    if length < 2:  # noqa: PLR2004 # one to condition on and one to score
        raise BadValue(f"a window of {length} tokens scores nothing; give at least 2")
    if protocol == "word":
        assert bos_id is not None
        return _by_document(tokenizer, text, length, bos_id)
    first = [] if protocol == "sun-4096" or bos_id is None else [bos_id]
    ids = _encode(tokenizer, text.joiner.join(text.documents), special=text.special and not first)
    step = length - len(first)
    kept = len(ids) if protocol == "bos" else max(len(ids) // step * step, min(len(ids), step))
    cut = [torch.tensor(first + ids[start : start + step]) for start in range(0, kept, step)][: text.most]
    cut = [one for one in cut if len(one) > 1]
    if not cut:
        raise BadValue("the text has no token to score; expected some text")
    short = f"the text has {len(ids)} tokens, less than a window of {step}: it is evaluated as one short window"
    scored = tuple(len(one) - 1 for one in cut)
    notes = (short,) if len(ids) < step else ()
    return Windows(
        tuple(cut), scored, tuple(range(len(cut))), scored, protocol, length, first[0] if first else None, notes
    )


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
    weight: Tensor = model.get_input_embeddings().weight  # (V, H)
    device = weight.device
    size = batch_size or max(1, tokens_at_once(weight) // max(len(ids) for ids in windows.ids))
    with torch.inference_mode():
        head = head_of(model, windows.ids[0][None].to(device))
        sums = _sums(head, windows, size, device, on_batch)
    nll = [0.0] * len(windows.units)
    for sample, value in zip(windows.sample, sums, strict=True):
        nll[sample] += value
    notes = () if head.why is None else (f"{head.why}: logits of whole windows are held",)
    return summarize(nll, windows.units, time.perf_counter() - start, notes)


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
    nonfinite = f"{len(bad)} of {n} samples gave no finite loss, the first is number {bad[0]}" if bad else None
    if math.isnan(mean):
        value = math.nan
    elif math.isinf(value) and nonfinite is None:
        nonfinite = f"the mean loss is {mean:.4g}, whose exponential is beyond float64"
    stderr = None
    if n > 1 and nonfinite is None:
        squares = math.fsum((one - mean * count) ** 2 for one, count in zip(nll, counts, strict=True))
        stderr = value * math.sqrt(squares * n / (n - 1)) / total
    return Perplexity(value, stderr, tuple(nll), tuple(counts), seconds, nonfinite, notes)


def _sums(
    head: Head, windows: Windows, size: int, device: torch.device, on_batch: Callable[[int, int], None] | None
) -> list[float]:
    """Sum of -ln p of each window, in float64; nothing waits for the device before the last batch."""
    order = sorted(range(len(windows.ids)), key=lambda index: -len(windows.ids[index]))
    found: list[Tensor] = []
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        ids, scored = _padded([windows.ids[i] for i in batch], [windows.scored[i] for i in batch])
        losses = head.losses(ids, scored, windows.length, device).double()  # (N,)
        owner = sent(scored.nonzero()[:, 0], losses.device)
        found.append(torch.zeros(len(batch), dtype=torch.float64, device=losses.device).index_add_(0, owner, losses))
        if on_batch is not None:
            on_batch(min(start + size, len(order)), len(order))
    values = torch.cat(found).tolist()
    return [value for _, value in sorted(zip(order, values, strict=True), key=lambda pair: pair[0])]


def _padded(ids: list[Tensor], scored: list[int]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right and which of them are scored, both (B, T)."""
    longest = max(map(len, ids))
    whole = torch.zeros(len(ids), longest, dtype=torch.long)
    counted = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, (one, last) in enumerate(zip(ids, scored, strict=True)):
        whole[row, : len(one)] = one
        counted[row, len(one) - last : len(one)] = True
    return whole, counted


def _by_document(tokenizer: PreTrainedTokenizerBase, text: Text, length: int, bos_id: int) -> Windows:
    """Documents one by one; words are what whitespace separates."""
    ids: list[Tensor] = []
    scored: list[int] = []
    sample: list[int] = []
    units: list[int] = []
    for document in text.documents:
        tokens = _encode(tokenizer, document, special=False)
        if not tokens:
            continue
        for window, last in _rolling([bos_id, *tokens], length):
            ids.append(torch.tensor(window))
            scored.append(last)
            sample.append(len(units))
        units.append(len(re.split(r"\s+", document)))
    if not ids:
        raise BadValue("the text has no token to score; expected some text")
    return Windows(tuple(ids), tuple(scored), tuple(sample), tuple(units), "word", length, bos_id)


def _rolling(tokens: list[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Windows that read `length` tokens and score each token once; the last one reaches back to be full."""
    for end in range(length, len(tokens) - 1 + length, length):
        last = min(end, len(tokens) - 1)  # the last token scored
        yield tokens[max(0, last - length) : last + 1], last - (end - length)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
