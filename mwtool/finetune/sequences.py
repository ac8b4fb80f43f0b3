"""Sequences of token ids: what is trained on and what is held out, packing, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.finetune.records import Unreadable

IGNORED = -100
"""The label of a token that is not trained on, as in transformers."""
Reason = Literal["too_long", "too_short", "untrained"]
REASONS: dict[Reason, str] = {
    "too_long": "longer than {} tokens (--max-length)",
    "too_short": "too short: no token to learn behind the first",
    "untrained": "without an answer to train on: all have weight 0",
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that was read and is not trained on. where: as `Example.where`."""

    where: str
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Sequences ready to be batched.

    ids, labels: one tensor (T,) int32 for each sequence; label `IGNORED` where a token is not trained on.
    lengths: tokens of each of the examples that a sequence is packed from; one each without packing.
    left_out: records that were read and are not trained on. refused: records that the chat template does not write.
    cut: records whose last messages are left out, since no answer follows them.
    notes: what the user should know. date: the day that the chat template writes into conversations, if it writes one.
    """

    ids: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    lengths: tuple[tuple[int, ...], ...]
    left_out: tuple[LeftOut, ...] = ()
    refused: tuple[Unreadable, ...] = ()
    cut: int = 0
    notes: tuple[str, ...] = ()
    date: datetime | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence; `position_ids` begin again with each packed example."""
        places = torch.cat([torch.arange(length) for length in self.lengths[index]])
        return {"input_ids": self.ids[index], "labels": self.labels[index], "position_ids": places}

    @property
    def trained_tokens(self) -> int:
        """How many tokens are learned in one epoch."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    def only(self, chosen: Sequence[int]) -> Encoded:
        """The sequences with these numbers."""
        return Encoded(
            ids=tuple(self.ids[at] for at in chosen),
            labels=tuple(self.labels[at] for at in chosen),
            lengths=tuple(self.lengths[at] for at in chosen),
        )


def split(encoded: Encoded, share: float, seed: int) -> tuple[Encoded, Encoded | None]:
    """What is trained on and what is held out, drawn with `seed`; nothing is held out if `share` is 0.

    Raises BadValue where there are too few sequences for both.
    """
    if share == 0:
        return encoded, None
    held = max(1, round(share * len(encoded)))
    if held >= len(encoded):
        raise BadValue(
            f"{len(encoded)} sequences are too few to hold {share:.0%} out; give more data, or --eval-share 0"
        )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    return encoded.only(sorted(order[held:])), encoded.only(sorted(order[:held]))


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sequences as a batch, (B, T), padded on the right with tokens that are neither attended to nor learned."""
    longest = max(len(one["input_ids"]) for one in examples)
    packed = any((one["position_ids"][1:] == 0).any() for one in examples)
    batch = {
        "input_ids": torch.stack([_filled(one["input_ids"], longest, 0) for one in examples]).long(),
        "labels": torch.stack([_filled(one["labels"], longest, IGNORED) for one in examples]).long(),
    }
    if packed:  # a mask would keep transformers from telling the examples apart by their positions
        batch["position_ids"] = torch.stack([_placed(one["position_ids"], longest) for one in examples])
    else:
        batch["attention_mask"] = torch.stack(
            [_filled(torch.ones(len(one["input_ids"]), dtype=torch.long), longest, 0) for one in examples]
        )
    return batch


def _filled(values: Tensor, length: int, by: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=by)


def _placed(places: Tensor, length: int) -> Tensor:
    """Padding is one more example, which only it sees."""
    return torch.cat([places, torch.arange(length - len(places))])


def packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of the sequences that share a row: first fit, the longest first."""
    room: list[int] = []
    bins: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        # only the newest rows have room to speak of; looking at all would take quadratic time
        first = next((one for one in range(max(0, len(bins) - 256), len(bins)) if room[one] >= lengths[at]), None)
        if first is None:
            bins.append([])
            room.append(most)
            first = len(bins) - 1
        bins[first].append(at)
        room[first] -= lengths[at]
    return bins
