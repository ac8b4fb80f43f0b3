"""The texts that a scan runs besides bos alone: read, turned into tokens, and cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mwtool.errors import BadValue, NoBos
from mwtool.models.context import positions

if TYPE_CHECKING:
    from mwtool.scan.subject import Subject

TOGETHER = 4096
"""Tokens in one forward: what a layer leaves of them fits in little memory."""


def tokens_of(subject: Subject, text: str) -> list[int]:
    """The tokens of a text, no special ones among them.

    Raises NoBos where there is no tokenizer, BadValue for a text without tokens, or with some the model does not have.
    """
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise NoBos(f"{subject.name} has no tokenizer, and a text needs one; leave out --positions, --sinks and --text")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise BadValue("the text has no tokens; expected some words")
    known: int = subject.model.config.get_text_config().vocab_size
    if max(ids) >= known:
        raise BadValue(
            f"the tokenizer of {subject.name} gives token {max(ids)} and the model has {known}; expected its own"
        )
    return ids


def words_of(subject: Subject, ids: list[int]) -> list[str]:
    """Tokens as people read them: with the spaces they begin with, and without a tokenizer's own marks."""
    tokenizer = subject.tokenizer
    assert tokenizer is not None
    names = tokenizer.convert_ids_to_tokens(ids)
    return [_readable(str(name), str(tokenizer.decode([one]))) for one, name in zip(ids, names, strict=True)]


def _readable(name: str, decoded: str) -> str:
    """What a token stands for; its name where that is not a whole character."""
    if "\N{REPLACEMENT CHARACTER}" in decoded or not decoded:
        return name
    return f" {decoded}" if name.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not decoded.startswith(" ") else decoded


def windows_of(subject: Subject, text: str, length: int, most: int) -> tuple[Tensor, tuple[str, ...]]:
    """At most `most` windows of `length` tokens, (N, T), and what to note.

    Every window begins with bos, unless there is none. What does not fill a window at the end is left out, except
    where it is all there is.
    """
    bos = [] if subject.bos.how == "none" else [subject.bos.id]
    ids = tokens_of(subject, text)
    limit = positions(subject.model.config)
    notes: tuple[str, ...] = ()
    if limit is not None and limit < length:
        notes = (f"windows of {length} tokens are shortened to the {limit} positions of the model",)
        length = limit
    step = length - len(bos)
    starts = range(0, len(ids) - step + 1, step)[:most]
    if not starts:
        short = f"the text has {len(ids)} tokens, fewer than a window of {length}: it is read as one short window"
        return torch.tensor([bos + ids]), (*notes, short)
    return torch.tensor([bos + ids[start : start + step] for start in starts]), notes


def batches(windows: Tensor) -> Iterator[Tensor]:
    """Windows, (N, T), in parts that fit one forward, (B, T)."""
    yield from torch.split(windows, max(1, TOGETHER // windows.shape[1]))
