"""What tests of the training loss share: sequences of unequal length, and the loss by all logits and by few."""

from __future__ import annotations

from typing import Any

import torch

from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.sequences import IGNORED, Encoded


def encoded(lengths: tuple[int, ...] = (9, 5, 12, 3), prompt: int = 2) -> Encoded:
    draw = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(3, 40, (length,), generator=draw, dtype=torch.int32) for length in lengths)
    labels = tuple(one.clone() for one in ids)
    for one in labels:
        one[:prompt] = IGNORED
    return Encoded(ids=ids, labels=labels, lengths=tuple((length,) for length in lengths))


def whole(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The mean over tokens by all logits, as transformers computes it."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)


def narrow(model: Any, batch: dict[str, Any], head: TrainedHead, items: int | None = None) -> torch.Tensor:
    batch = dict(batch)
    labels = batch.pop("labels")
    with head.at(labels):
        return head.token_mean(model(**batch, use_cache=False), labels, items)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
