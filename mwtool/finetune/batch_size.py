"""How many sequences fit into a device's memory at once, found by trial steps before training begins.

A trial step is a forward and backward over the longest sequences, in the precision of training, while memory is held
back for what a trial does not allocate. It leaves no trace: no weight is changed, gradients are freed, and random
numbers continue where they were. The optimizer's steps do not depend on what is found: the effective batch is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_executable_batch_size, gather_object
from torch import Tensor

from mwtool.architecture.validate import unwrapped
from mwtool.errors import MwtoolError
from mwtool.finetune.config import AUTO, Recipe
from mwtool.finetune.loss import trained_head
from mwtool.finetune.padding_free import chosen, rows
from mwtool.finetune.sequences import Encoded, collate

if TYPE_CHECKING:
    from peft import PeftModel

ON_CPU = 8
"""Sequences at once where there is no trial: memory is the machine's, and more at once are no faster on a CPU."""
MOMENTS, MARGIN = 8, 0.05
"""Held back during a trial: bytes of Adam's two moments for each trained parameter, and a share of the memory for what
allocations of other sizes leave unused between them."""


def sizes(recipe: Recipe, sequences: int, processes: int = 1) -> tuple[int, ...]:
    """Sequences a device may take at once so that the effective batch comes out even, the largest first."""
    share = recipe.effective_batch // processes
    found = [size for size in range(share, 0, -1) if share % size == 0 and size <= max(1, sequences)]
    return tuple(found)


def without_trial(recipe: Recipe, sequences: int, processes: int = 1) -> Recipe:
    """The recipe with what is still `auto` set as suits a CPU: at most 8 sequences, nothing recomputed."""
    size = next(size for size in sizes(recipe, sequences, processes) if size <= ON_CPU)
    return replace(
        recipe,
        batch_size=size if recipe.batch_size == AUTO else recipe.batch_size,
        gradient_checkpointing=bool(recipe.gradient_checkpointing),
        padding_free=bool(recipe.padding_free),
    )


def settled(recipe: Recipe) -> bool:
    """Whether nothing is left to be found by trials."""
    return recipe.batch_size != AUTO and None not in {recipe.gradient_checkpointing, recipe.padding_free}


def fitted(model: PeftModel, data: Encoded, recipe: Recipe, *, processes: int = 1) -> Recipe:
    """The recipe with the largest batch size that fits, and with checkpointing only if nothing fits without it.

    data: what is trained on. Every process tries on its own device, and all take what fits on each.
    Raises MwtoolError if not even one sequence fits, UnsupportedModel as `padding_free.chosen` does.
    """
    collator = chosen(model, recipe)
    recipe = replace(recipe, padding_free=collator is not collate)
    device = model.get_input_embeddings().weight.device
    if settled(recipe):
        return recipe
    if device.type != "cuda":
        return without_trial(recipe, len(data), processes)
    longest = sorted(range(len(data)), key=lambda at: -len(data.ids[at]))

    def fits(size: int, *, checkpointing: bool) -> None:
        with _held_back(model, device), rows(model, recipe.dtype) if recipe.padding_free else nullcontext():
            _trial(model, collator([data[at] for at in longest[:size]]), recipe, checkpointing=checkpointing)

    size, checkpointing = tried(recipe, sizes(recipe, len(data), processes), fits, longest=len(data.ids[longest[0]]))
    if processes > 1:
        found = gather_object([(size, checkpointing)])
        size, checkpointing = min(one for one, _ in found), any(one for _, one in found)
    return replace(recipe, batch_size=size, gradient_checkpointing=checkpointing)


def tried(recipe: Recipe, candidates: tuple[int, ...], fits: Callable[..., None], *, longest: int) -> tuple[int, bool]:
    """Batch size and checkpointing of the first trial that does not run out of memory.

    candidates: batch sizes, the largest first. fits: called with one of them and `checkpointing`. longest: tokens of
    the longest sequence. What the recipe sets is not varied. Raises MwtoolError if no trial fits.
    """
    left = candidates if recipe.batch_size == AUTO else (int(recipe.batch_size),)
    ways = (False, True) if recipe.gradient_checkpointing is None else (recipe.gradient_checkpointing,)
    for checkpointing in ways:
        smaller = iter((*left[1:], 0))

        def trial(batch_size: int, way: bool = checkpointing) -> int:  # noqa: FBT001 # accelerate passes it none
            fits(batch_size, checkpointing=way)
            return batch_size

        find = find_executable_batch_size(
            trial, starting_batch_size=left[0], reduce_batch_size_fn=lambda rest=smaller: next(rest)
        )
        try:
            return find(), checkpointing
        except RuntimeError as fault:
            if "No executable batch size found" not in str(fault):
                raise
    add = [] if ways[-1] else ["--gradient-checkpointing"]
    add += [] if recipe.quantize else ["--quantize 4bit"]
    more = f", or add {' or '.join(add)}" if add else ""
    raise MwtoolError(
        f"not enough memory to train on {left[-1]} sequence{'s' if left[-1] > 1 else ''} of {longest} tokens at "
        f"once: lower --max-length{more}"
    )


def _trial(model: Any, batch: dict[str, Any], recipe: Recipe, *, checkpointing: bool) -> None:
    """Forward and backward as Trainer runs them, and everything as it was afterwards."""
    device, training = model.get_input_embeddings().weight.device, model.training
    head = trained_head(model)
    model.train()
    try:
        if head is not None:
            head.narrow_if_same()
        with recomputed(model, on=checkpointing):
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                in_precision(recipe, device.type),
            ):
                given = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
                if head is None:
                    loss: Tensor = model(**given).loss
                else:
                    labels = given.pop("labels")
                    with head.at(labels):
                        loss = head.token_mean(model(**given), labels)
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)


def in_precision(recipe: Recipe, device_type: str) -> AbstractContextManager[object]:
    """Autocast as Trainer has it, for recipes in 16 bits."""
    lower = recipe.dtype in ("bfloat16", "float16")
    return torch.autocast(device_type, getattr(torch, recipe.dtype)) if lower else nullcontext()


@contextmanager
def recomputed(model: Any, *, on: bool) -> Iterator[None]:
    """Inside the block, activations are recomputed in the backward pass, if `on`."""
    if not on:
        yield
        return
    recomputing(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        recomputing(model, "disable")()


def recomputing(model: Any, switch: str) -> Callable[..., None]:
    """transformers' switch of activation checkpointing, under its new name where it has that."""
    inner: Any = unwrapped(model)
    old = getattr(inner, f"gradient_checkpointing_{switch}")
    found: Callable[..., None] = getattr(inner, f"activation_checkpointing_{switch}", old)
    return found


@contextmanager
def _held_back(model: PeftModel, device: torch.device) -> Iterator[None]:
    """Memory that a trial must leave free."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    share = MARGIN * torch.cuda.get_device_properties(device).total_memory
    kept = torch.empty(int(MOMENTS * trained + share), dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del kept
        torch.cuda.empty_cache()
