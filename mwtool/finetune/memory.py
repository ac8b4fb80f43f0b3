"""How much of a model is trained, and about how much memory training takes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mwtool.finetune.trainer import adapted

if TYPE_CHECKING:
    from mwtool.finetune.plan import Plan

FOUR_BIT = 0.516
"""Bytes a weight packed in 4 bits takes, with the scales of its blocks (NF4, double quantization)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Parameters, and an estimate of bytes on each device, for the longest sequences.

    weights: the frozen model. adapter: parameters, gradients and Adam's two moments, float32. activations: what the
    backward needs, and the logits. kept: MacDrop's copy of the rows.
    """

    parameters: int
    trainable: int
    weights: float
    adapter: float
    activations: float
    kept: float

    @property
    def share(self) -> float:
        """Trainable over all parameters."""
        return self.trainable / (self.parameters + self.trainable)

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.weights + self.adapter + self.activations + self.kept

    @property
    def parts(self) -> str:
        """In words."""
        named = {"weights": self.weights, "adapter": self.adapter, "activations": self.activations, "rows": self.kept}
        return ", ".join(f"{name} {value / 1e6:,.1f} MB" for name, value in named.items() if value)


def footprint(plan: Plan) -> Footprint:
    """Of a run that is planned; its skeleton gets an adapter. Raises BadValue where the target modules do not exist."""
    model, recipe = plan.skeleton, plan.recipe
    size = torch.finfo(getattr(torch, recipe.dtype)).bits // 8
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in name
    )
    packed = linear if recipe.quantize else 0
    activations, kept = _activations(plan, size), _kept(plan) * size
    with torch.device("meta"):
        wrapped = adapted(model, plan.source, recipe)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    weights = (parameters - packed) * size + packed * FOUR_BIT
    return Footprint(
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        adapter=16.0 * trainable,
        activations=activations,
        kept=float(kept),
    )


def _activations(plan: Plan, size: int) -> float:
    """What one micro-batch keeps for its backward: a rule of thumb, within a factor of two.

    A layer keeps about 16 states of width H and 4 of width I a token; with checkpointing its input alone, and one
    layer all of it. Logits are held in float32 with their gradient, and once in the model's precision.
    """
    config = plan.skeleton.config.get_text_config()
    longest = max(len(ids) for ids in plan.train.ids)
    tokens, hidden, layers = plan.recipe.at_once * longest, config.hidden_size, config.num_hidden_layers
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = tokens * (16 * hidden + 4 * wide) * size
    kept = layer + layers * tokens * hidden * size if plan.recipe.gradient_checkpointing else layers * layer
    return float(kept + tokens * config.vocab_size * (8 + size))


def _kept(plan: Plan) -> int:
    """Entries of the rows MacDrop keeps a copy of."""
    curriculum, config = plan.recipe.curriculum, plan.skeleton.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    rows = {"massive": curriculum.k, "others": width - curriculum.k, "all": width}[curriculum.scope]
    return int(2 * rows * config.hidden_size * len(plan.places))
