"""The loss of the tokens that are trained on, with the output head computed at their positions alone.

Logits take more memory than all else of a small model: V float32 numbers a position. Most positions of a batch are
prompts and padding, whose logits nothing reads. A hook on the output head passes on the hidden states of the others;
whatever the model does to logits (soft-capping, scales) is still the model's own code. A short forward pass tests that
this gives the logits of the whole forward; for a model for which it does not, all logits are computed and selected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mwtool.architecture.validate import unwrapped
from mwtool.finetune.sequences import IGNORED

TOLERANCE = 1e-3
"""Of the largest logit: what two ways to compute one may differ by. Matrix products of other sizes round otherwise."""


class TrainedHead:
    """The logits of the tokens that are trained on.

    Attributes: narrow, whether the head runs at their positions alone; it does not before `narrow_if_same`.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = unwrapped(model)
        self.model, self.head, self.narrow = model, inner.get_output_embeddings(), False

    def narrow_if_same(self) -> None:
        """Run the head at the trained positions alone from now on, if a short forward gives the same logits so."""
        self.narrow = self.head is not None and _same_logits(self.model, self.head)

    @contextmanager
    def at(self, labels: Tensor) -> Iterator[None]:
        """Inside the block a forward of the model gives logits (1, N, V), of the N positions that `labels` trains.

        labels: (B, T). Does nothing where the model does not allow it.
        """
        if not self.narrow:
            yield
            return
        assert self.head is not None
        with at_positions(self.head, positions(labels)):
            yield

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-ln p of the trained tokens in the order of `labels`, (N,), float32.

        logits: (1, N, V), from a forward inside `at`; (B, T, V) where the model does not allow that.
        """
        flat = logits.flatten(0, 1)
        if not self.narrow:
            flat = flat[positions(labels)]
        return functional.cross_entropy(flat.float(), targets(labels), reduction="none")

    def token_mean(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch, as `compute_loss_func` of Trainer: a sum over its tokens, as a share of the step.

        labels: (B, T). num_items_in_batch: trained tokens of all micro-batches of the optimizer step, so that their
        losses add up to the mean over its tokens, however they are divided; None: those of this one.
        """
        losses = self.losses(_logits(outputs), labels)
        count = max(1, losses.numel()) if num_items_in_batch is None else num_items_in_batch
        total: Tensor = losses.sum() / count
        return total

    def sums(self, outputs: Any, labels: Tensor) -> Tensor:
        """The summed loss of each sequence and how many tokens it is of, (B, 2), float64. labels: (B, T)."""
        losses = self.losses(_logits(outputs), labels).double()
        trained = labels[:, 1:] != IGNORED
        found = torch.zeros(len(labels), 2, dtype=torch.float64, device=losses.device)
        found[:, 0].index_add_(0, trained.nonzero()[:, 0].to(losses.device), losses)
        found[:, 1] = trained.sum(1).to(losses.device)
        return found


def trained_head(model: nn.Module) -> TrainedHead | None:
    """How the losses of this model are computed; None where its own loss is more than that of its tokens.

    That is so for mixtures of experts which add a loss of their router.
    """
    config: Any = unwrapped(model).config
    return None if getattr(config.get_text_config(), "output_router_logits", False) else TrainedHead(model)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def positions(labels: Tensor) -> Tensor:
    """Numbers of the positions, among B * T, in front of the trained tokens: they have their logits. labels: (B, T)."""
    return functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]


def targets(labels: Tensor) -> Tensor:
    """The trained tokens themselves, in the order of `positions`, (N,). labels: (B, T)."""
    shifted = labels[:, 1:]
    return shifted[shifted != IGNORED]


@contextmanager
def at_positions(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Inside the block, the head sees the hidden states of these positions only: (B, T, H) become (1, N, H)."""

    def narrowed(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0].flatten(0, 1)[places.to(given[0].device)][None], *given[1:])

    handle = head.register_forward_pre_hook(narrowed)
    try:
        yield
    finally:
        handle.remove()


def _same_logits(model: Any, head: nn.Module) -> bool:
    """Whether the head gives the same logits at a few positions alone, by a forward pass of 2 x 8 tokens."""
    device = model.get_input_embeddings().weight.device
    size = min(unwrapped(model).config.get_text_config().vocab_size, 16)
    ids = (torch.arange(16, device=device).reshape(2, 8) * 3 + 1) % size
    places = torch.tensor([1, 2, 6, 8, 13], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[places].float()
            with at_positions(head, places):
                some = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError):  # its forward does more with the logits than with each on its own
        return False
    finally:
        model.train(training)
    if some.shape != (1, *whole.shape):
        return False
    bound = TOLERANCE * float(whole.nan_to_num().abs().max())
    return torch.allclose(some[0].float(), whole, rtol=0, atol=bound, equal_nan=True)
