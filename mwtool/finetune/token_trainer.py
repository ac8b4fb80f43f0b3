"""transformers' Trainer with losses that are means over tokens, and with micro-batches without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.padding_free import padded
from mwtool.finetune.sequences import collate

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

Collate = Callable[[Sequence[dict[str, Tensor]]], dict[str, Any]]


class GroupedByLength(LengthGroupedSampler):
    """Sequences of similar length together; the order follows from seed and epoch, which accelerate announces."""

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch. epoch: from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=self.generator))


class TokenTrainer(Trainer):
    """Trainer whose losses, of a step and held out, are means over trained tokens, however they are put into batches.

    Trainer's own held-out loss is the mean over examples of the mean over the tokens of their batch, and its training
    loss is a mean over the tokens of the step only for models that take the number of them.

    head: computes the losses; None: the model computes the loss of training itself, as kernels that are part of the
    model do. collator: puts sequences into a micro-batch. Held-out sequences are always padded: the order in which
    processes gather them is that of the rows of a batch.
    """

    def __init__(self, *, head: TrainedHead | None, collator: Collate = collate, **options: Any) -> None:
        self.trained_head = head
        super().__init__(
            data_collator=collator,
            compute_loss_func=None if head is None else head.token_mean,
            compute_metrics=_token_mean,
            **options,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer's; by length, in an order of each epoch that does not depend on where a run was resumed."""
        made = super()._get_train_sampler(train_dataset)
        if isinstance(made, LengthGroupedSampler):
            return GroupedByLength(made.batch_size, lengths=made.lengths, seed=self.args.seed)
        return made

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """As Trainer's, with the head at the trained positions alone."""
        if self.trained_head is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, *args, **options)
        with self.trained_head.at(inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **options)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *_args: Any, **_options: Any
    ) -> tuple[None, Tensor, Tensor]:
        """The summed loss of each held-out sequence and how many tokens it is of, (B, 2), in place of logits."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        head = self.trained_head or TrainedHead(model)
        with torch.no_grad(), self.compute_loss_context_manager(), head.at(labels):
            sums = head.sums(model(**inputs), labels)
        return None, sums, sums[:, 1]

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """As Trainer's, with the mean over tokens as `eval_loss`."""
        with padded(self.model):
            found = super().evaluation_loop(*args, **options)
        metrics = found.metrics or {}
        if "eval_token_loss" in metrics:
            metrics["eval_loss"] = metrics.pop("eval_token_loss")
        return found

    def save_model(self, output_dir: str | None = None, *args: Any, **options: Any) -> None:
        """As Trainer's; under FSDP only what is trained is gathered, whatever type of state dict is set.

        Trainer gathers the whole model in the memory of the first process, or writes no adapter (sharded state dicts).
        """
        if self.is_fsdp_enabled and isinstance(self.model, nn.Module):
            self._save(output_dir, state_dict=trained_state(self.model))  # writes in the first process
        else:
            super().save_model(output_dir, *args, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's, with padding."""
        collator, self.data_collator = self.data_collator, collate
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, each whole, (...), on the CPU; all processes that hold parts call this."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part: Any = parameter.detach()
            whole: Tensor = part.full_tensor() if hasattr(part, "full_tensor") else part
            found[name] = whole.cpu()
    return found


def _token_mean(found: EvalPrediction) -> dict[str, float]:
    """The loss over all tokens that are held out; NaN if there is none."""
    total, count = np.asarray(found.predictions, dtype=np.float64).sum(0)
    return {"token_loss": float(total / count) if count else math.nan}
