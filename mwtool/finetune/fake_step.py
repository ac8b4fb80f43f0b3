"""What a training step keeps in memory, from a step on tensors that have shapes and no numbers.

torch's fake tensors go through the same code as real ones, on the same device: the model's own forward, autograd, and
whichever attention kernel torch would choose. What they would take is counted while they live. So nothing about an
architecture is assumed, no weights are needed, and a model of any size takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no other name for it
from torch.nn import functional

from mwtool.architecture.validate import unwrapped
from mwtool.finetune.batch_size import in_precision, recomputed
from mwtool.finetune.loss import at_positions, positions, targets
from mwtool.finetune.sequences import IGNORED, collate
from mwtool.models.peak_memory import LiveTensors

if TYPE_CHECKING:
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.sequences import Encoded


def step_peak(model: Any, data: Encoded, recipe: Recipe, *, steps: int, device: str) -> int:
    """Bytes at most beyond weights and optimizer, gradients included, in the second micro-batch of a step.

    model: with its adapter, on the meta device; it is left with fake weights. data: what is trained on. steps: of the
    optimizer, for the batches that are drawn. Raises RuntimeError where the model reads numbers.
    """
    batch = largest_batch(data, recipe, steps)
    labels = batch.pop("labels")
    places, wanted = positions(labels), targets(labels)
    head = unwrapped(model).get_output_embeddings()
    if bool(batch.get("attention_mask", torch.zeros(1)).all()):
        del batch["attention_mask"]  # transformers does without a mask that hides nothing, if it can read its numbers
    if recipe.padding_free:
        batch = {"input_ids": torch.zeros(1, int((labels != IGNORED).numel()), dtype=torch.long)}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    kind = torch.device(device).type
    with fake:
        model.to_empty(device=device)
        unwrapped(model).tie_weights()
        model.train()
        given = {name: torch.empty_like(values, device=device) for name, values in batch.items()}
        where, answers = (torch.empty_like(one, device=device) for one in (places, wanted))
        counted = LiveTensors(fake=True)
        with counted, recomputed(model, on=bool(recipe.gradient_checkpointing)):
            for _ in range(2):
                with in_precision(recipe, kind), at_positions(head, where):
                    logits: Tensor = model(**given).logits.flatten(0, 1)
                    loss = functional.cross_entropy(logits.float(), answers, reduction="none").sum()
                loss.backward()  # type: ignore[no-untyped-call]
                del logits, loss
    return counted.most


def largest_batch(data: Encoded, recipe: Recipe, steps: int) -> dict[str, Tensor]:
    """The largest micro-batch of as many random draws as a run makes: its most tokens, and the most trained on.

    Trainer draws in an order of its own; the largest of another order is about as large. Both may come from different
    batches: labels beyond those of the batch with the most tokens are then set on its first positions.
    Returns `input_ids`, `labels` and so on as `collate` does, (B, T).
    """
    sizes = torch.tensor([len(ids) for ids in data.ids])
    learned = torch.tensor([int((labels[1:] != IGNORED).sum()) for labels in data.labels])
    generator, at_once = torch.Generator().manual_seed(recipe.seed), recipe.at_once
    left, most, trained = steps * max(1, recipe.effective_batch // at_once), None, 0
    while left > 0:
        order = torch.randperm(len(sizes), generator=generator)
        batches = torch.split(order, at_once)[:left]
        left -= len(batches)
        longest = max(batches, key=lambda one: int(len(one) * sizes[one].max()))
        most = longest if most is None or _tokens(longest, sizes) > _tokens(most, sizes) else most
        trained = max(trained, *(int(learned[one].sum()) for one in batches))
    assert most is not None
    batch = collate([data[int(at)] for at in most])
    labels = batch["labels"]
    labels.fill_(IGNORED)
    inner = labels[:, 1:]  # the first token of a sequence is not predicted
    filled = inner.flatten().clone()
    filled[:trained] = 0
    labels[:, 1:] = filled.view_as(inner)
    return batch


def _tokens(batch: Tensor, sizes: Tensor) -> int:
    """With padding."""
    return int(len(batch) * sizes[batch].max())
