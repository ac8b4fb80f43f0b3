"""Batches of windows: how many run at once, how they are padded, and what happens where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mwtool.errors import MwtoolError
from mwtool.evaluation.windows import Windows

HIDDEN, MOST = 2**26, 2**16
"""Default size of a batch: tokens whose hidden states take 64 MB, but at most 65,536 tokens."""
NEEDED = 48
"""Free memory that a batch has to have, in sizes of its hidden states: twice what a dense model of 8 B parameters
takes, with intermediate states and a chunk of logits."""
CACHED = 4096
"""Default size of a batch on a CPU, in bytes at one entry per token: 2,048 tokens in bfloat16, which fit its caches."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows that are run together, padded on the right.

    windows: their indices. ids: (B, T), int64. scored: the tokens to score, (B, T) of bool. Both are on the CPU.
    """

    windows: tuple[int, ...]
    ids: Tensor
    scored: Tensor

    def split(self, size: int) -> list[Batch]:
        """Batches of at most `size` windows, in the same order."""
        return [
            Batch(self.windows[at : at + size], self.ids[at : at + size], self.scored[at : at + size])
            for at in range(0, len(self.windows), size)
        ]


def tokens_at_once(embedding: Tensor) -> int:
    """The default number of tokens in a batch. embedding: the embedding table, (V, H)."""
    device, bytes_ = embedding.device, embedding.shape[1] * embedding.element_size()  # of a token's hidden state
    if device.type == "cpu":
        return CACHED // embedding.element_size()
    most = min(MOST, HIDDEN // bytes_)
    return most if device.type != "cuda" else min(most, _free(device) // (NEEDED * bytes_))


def _free(device: torch.device) -> int:
    """Bytes of a GPU that torch can still allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def windows_at_once(model: Any, windows: Windows) -> int:
    """The default number of windows in a batch."""
    return max(1, tokens_at_once(model.get_input_embeddings().weight) // max(len(ids) for ids in windows.ids))


def batches(windows: Windows, size: int) -> Iterator[Batch]:
    """Batches of `size` windows, longest first."""
    order = sorted(range(len(windows.ids)), key=lambda index: -len(windows.ids[index]))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        yield Batch(tuple(some), *padded([windows.ids[i] for i in some], [windows.scored[i] for i in some]))


def padded(ids: list[Tensor], scored: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and which of them are scored, both (B, T)."""
    longest = max(map(len, ids))
    whole = torch.zeros(len(ids), longest, dtype=torch.long)
    counted = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, (one, last) in enumerate(zip(ids, scored, strict=True)):
        whole[row, : len(one)] = one
        counted[row, len(one) - last : len(one)] = True
    return whole, counted


class Halving:
    """Runs batches, in halves where memory does not suffice for the whole.

    most: windows at once, once that is known to be fewer than were asked for.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, batch: Batch, of: Callable[[Batch], Sequence[Tensor]]) -> list[Tensor]:
        """What `of` gives for the batch, put together from its parts: tensors with an entry a window, (B,) each.

        Raises MwtoolError if memory does not suffice for one window.
        """
        pending, found = batch.split(self.most or len(batch.windows)), list[Sequence[Tensor]]()
        while pending:
            done = _unless_out_of_memory(of, pending[0])
            if done is not None:
                found.append(done)
                del pending[0]
                continue
            size = len(pending[0].windows)
            if size == 1:
                raise MwtoolError(
                    f"not enough memory for one window of {pending[0].ids.shape[1]:,} tokens; give a shorter --window, "
                    f"or --device-map auto"
                )
            self.most = (size + 1) // 2
            pending = [half for one in pending for half in one.split(self.most)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.most is None:
            return ()
        many = "one window was" if self.most == 1 else f"{self.most} windows were"
        return (f"not enough memory for larger batches: {many} run at once",)


def _unless_out_of_memory(of: Callable[[Batch], Sequence[Tensor]], batch: Batch) -> Sequence[Tensor] | None:
    """None where memory ran out. By the time this returns, the exception holds none of it."""
    try:
        return of(batch)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    return None
