"""How a text is cut into windows of tokens. Perplexities of different protocols cannot be compared.

A protocol is one entry of `PROTOCOLS`. This module imports torch on first use only: the command line reads the table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mwtool.errors import BadValue, NoBos, nearest
from mwtool.models.context import positions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LENGTH = 4096
"""Tokens in a window by default."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What the summed loss is divided by.

    count: how many units a document has. None: the units are the scored tokens; documents are joined into one text
    and every window is a sample. Otherwise every document is cut by itself and is one sample.
    """

    name: str
    count: Callable[[str], int] | None = None

    @property
    def metric(self) -> str:
        """The name of the resulting perplexity: `perplexity`, `word_perplexity`."""
        return "perplexity" if self.count is None else f"{self.name}_perplexity"


TOKEN = Unit("token")
WORD = Unit("word", lambda document: len(re.split(r"\s+", document)))


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a text becomes windows. Every token is scored at most once.

    bos: where bos is put: before every `window`, once before each `document`, or `never`. After `never`, the first
    token of a window is not scored, since nothing precedes it.
    tail: what becomes of the tokens at the end that do not fill a window: `keep` them as a shorter window, `drop` them
    (unless they are all there is), or `fill` the window with earlier tokens, which are read again but not scored.
    unit: what the summed loss is divided by.
    """

    bos: Literal["window", "document", "never"]
    tail: Literal["keep", "drop", "fill"]
    unit: Unit = TOKEN


PROTOCOLS: dict[str, Protocol] = {
    "bos": Protocol(bos="window", tail="keep"),
    "bos-4096": Protocol(bos="window", tail="drop"),
    "sun-4096": Protocol(bos="never", tail="drop"),  # the paper's, from the code of Sun et al. 2024
    "word": Protocol(bos="document", tail="fill", unit=WORD),  # that of lm-evaluation-harness
}
"""Every protocol by its name, as `--protocol` takes it."""


def protocol_named(name: str) -> Protocol:
    """A protocol by its name. Raises BadValue, which suggests the most similar name."""
    if name not in PROTOCOLS:
        raise BadValue(f"unknown protocol {name!r}; {nearest(name, list(PROTOCOLS))}")
    return PROTOCOLS[name]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to measure perplexity on.

    documents: joined by `joiner`, unless the protocol scores each document by itself.
    special: whether the tokenizer adds its special tokens once to the whole text, if the protocol puts no bos.
    most: the largest number of windows, as in the paper's code; None for all.
    """

    documents: tuple[str, ...]
    joiner: str = "\n\n"
    special: bool = False
    most: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A text cut into windows.

    ids: token ids of each window, (T,), int64. scored: how many tokens at the end of each window are scored.
    sample: the index of the sample that each window belongs to. units: how many units each sample has (tokens, or
    words under `word`). length: the most tokens of a window that the model reads. bos: id of bos, None if none is put.
    """

    ids: tuple[Tensor, ...]
    scored: tuple[int, ...]
    sample: tuple[int, ...]
    units: tuple[int, ...]
    protocol: str
    metric: str
    length: int
    bos: int | None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Equal for the same tokens scored in the same windows, whatever the model."""
        state = hashlib.sha256(repr((self.scored, self.sample, self.units)).encode())
        for ids in self.ids:
            state.update(ids.numpy().tobytes())
        return state.hexdigest()[:16]

    def first(self, samples: int | None) -> Windows:
        """Only the first samples; None for all."""
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
    protocol: str = "bos",
    length: int = LENGTH,
    bos_id: int | None = None,
) -> Windows:
    """Cut a text into windows. The model reads at most `length` tokens at once, bos included.

    protocol: a name in `PROTOCOLS`. bos_id: id of bos, for protocols that put it.
    Raises NoBos if the protocol needs bos and none is given, BadValue for an unknown protocol, a window shorter than 2
    tokens, or a text without a token to score.
    """
    import torch

    text = Text((text,)) if isinstance(text, str) else text
    rule = protocol_named(protocol)
    if bos_id is None and rule.bos != "never":
        raise NoBos(f"protocol {protocol} puts bos first and none was given; name it with --bos, or use sun-4096")
    if length < 2:  # noqa: PLR2004 # one to condition on and one to score
        raise BadValue(f"a window of {length} tokens scores nothing; give at least 2")
    bos = [] if rule.bos == "never" or bos_id is None else [bos_id]
    documents = (text.joiner.join(text.documents),) if rule.unit.count is None else text.documents
    tokens = [_encode(tokenizer, document, special=text.special and not bos) for document in documents]
    cuts = [list(_cut(one, rule, length, bos)) for one in tokens]
    if rule.unit.count is None:
        found = cuts[0][: text.most]
        sample, units = list(range(len(found))), [scored for _, scored in found]
    else:
        kept = [(document, cut) for document, cut in zip(documents, cuts, strict=True) if cut]
        found = [window for _, cut in kept for window in cut]
        sample = [index for index, (_, cut) in enumerate(kept) for _ in cut]
        units = [rule.unit.count(document) for document, _ in kept]
    if not found:
        raise BadValue("the text has no token to score; expected some text")
    return Windows(
        ids=tuple(torch.tensor(window) for window, _ in found),
        scored=tuple(scored for _, scored in found),
        sample=tuple(sample),
        units=tuple(units),
        protocol=protocol,
        metric=rule.unit.metric,
        length=length,
        bos=bos[0] if bos else None,
        notes=_short_note(rule, len(tokens[0]), length - len(bos)),
    )


def _short_note(rule: Protocol, tokens: int, step: int) -> tuple[str, ...]:
    if rule.unit.count is not None or tokens >= step:
        return ()
    return (f"the text has {tokens} tokens, fewer than a window of {step}: it is evaluated as one short window",)


def _cut(tokens: list[int], rule: Protocol, length: int, bos: list[int]) -> Iterator[tuple[list[int], int]]:
    """Each window with the number of tokens scored at its end."""
    first = bos if rule.bos == "window" else []
    stream = bos + tokens if rule.bos == "document" else tokens
    before = len(stream) - len(tokens)  # tokens of context that a window reads beyond `step`: the one before it
    step = length - len(first)
    for start in range(before, len(stream), step):
        end = min(start + step, len(stream))
        begin = start - before
        if end - start < step and start > before:
            if rule.tail == "drop":
                return
            if rule.tail == "fill":
                begin = max(0, end - step - before)
        window = first + stream[begin:end]
        last = min(end - start, len(window) - 1)
        if last > 0:
            yield window, last


def window_for(config: Any, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """Tokens in a window: as asked, else 4096, but no more than the model has positions; and a note if it is fewer."""
    wanted, most = asked or LENGTH, positions(config)
    if most is None or wanted <= most:
        return wanted, ()
    return most, (f"windows of {wanted} tokens are shortened to the {most} positions of the model",)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
