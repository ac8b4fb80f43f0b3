"""How a text becomes windows of tokens: named protocols, whose figures cannot be compared with each other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.errors import BadValue, NoBos
from mwtool.evaluation.config import Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 4096


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


def window_for(config: Any, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """Tokens in a window: as asked, else 4096, and no more than the model has positions for."""
    wanted, most = asked or LENGTH, positions(config)
    if most is None or wanted <= most:
        return wanted, ()
    return most, (f"windows of {wanted} tokens are shortened to the {most} the model has",)


def positions(config: Any) -> int | None:
    """Positions a model has, by its configuration; None where it sets no bound."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None


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
