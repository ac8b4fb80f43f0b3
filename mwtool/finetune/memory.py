"""How much of a model is trained, and how much memory training takes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from mwtool.files.units import size
from mwtool.finetune.trainer import adapted
from mwtool.models.peak_memory import process_peak, resident
from mwtool.models.weight_files import find_weights

if TYPE_CHECKING:
    from mwtool.finetune.plan import Plan

FOUR_BIT = 0.516
"""Bytes a weight packed in 4 bits takes, with the scales of its blocks (NF4, double quantization)."""
MOMENTS = 8
"""Bytes of Adam's two moments for each trained parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Parameters, and bytes on each device at most.

    weights: the frozen model. adapter: parameters and Adam's two moments. activations: what a micro-batch keeps for its
    backward, its logits and the gradients of the adapter; None if it was not asked for, or cannot be known from shapes.
    kept: MacDrop's copy of the rows. process: what the process is resident with, on a CPU; None elsewhere.
    """

    parameters: int
    trainable: int
    weights: float
    adapter: float
    activations: float | None
    kept: float
    process: int | None = None

    @property
    def share(self) -> float:
        """Trainable over all parameters."""
        return self.trainable / (self.parameters + self.trainable)

    @property
    def total(self) -> float:
        """All that is known of it, in bytes."""
        return self.weights + self.adapter + (self.activations or 0.0) + self.kept

    @property
    def parts(self) -> str:
        """In words."""
        named = {"weights": self.weights, "adapter": self.adapter, "activations": self.activations, "rows": self.kept}
        return ", ".join(f"{name} {size(value)}" for name, value in named.items() if value)


def footprint(plan: Plan, device: str | None = None) -> Footprint:
    """Of a run that is planned; its skeleton gets an adapter. Raises BadValue where the target modules do not exist.

    device: where it trains, for what a step takes there; None: without, which is known at once.
    """
    model, recipe, now = plan.skeleton, plan.recipe, resident()
    dtype = getattr(torch, recipe.dtype)
    bytes_each = torch.finfo(dtype).bits // 8
    model.tie_weights()  # a model without weights has not been tied yet: its head would count once more
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in name
    )
    packed = linear if recipe.quantize else 0
    with torch.device("meta"):
        wrapped = adapted(model.to(dtype), plan.source, recipe)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    found = Footprint(
        parameters=parameters,
        trainable=trainable,
        weights=(parameters - packed) * bytes_each + packed * FOUR_BIT,
        adapter=float(sum(p.numel() * (p.element_size() + MOMENTS) for p in trained)),
        activations=None,
        kept=float(_kept(plan) * bytes_each),
    )
    return found if device is None else _with_step(found, plan, wrapped, device, now)


def _with_step(found: Footprint, plan: Plan, wrapped: nn.Module, device: str, now: int) -> Footprint:
    """With what a step takes, and the process on a CPU. now: bytes this process was resident with before."""
    from mwtool.finetune.fake_step import step_peak

    try:
        peak = step_peak(wrapped, plan.train, plan.recipe, steps=plan.steps, device=device)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # its forward reads numbers, which are not there
        return found
    found = replace(found, activations=float(peak))
    return found if device != "cpu" else replace(found, process=_process(found, plan, now))


def _process(found: Footprint, plan: Plan, now: int) -> int:
    """Bytes that the process is resident with at most: at the end of loading, or in a step.

    Weights that are trained with as they are stored stay in the file's pages. Others are copied while all pages of the
    files have been read.
    """
    source = plan.source
    files = None if source.gguf is not None else find_weights(source)
    stored = 0 if files is None else sum((source.folder / name).stat().st_size for name in files.shards)
    copied = stored if abs(stored / max(1.0, found.weights) - 1) > 0.1 else 0  # noqa: PLR2004 # buffers and headers
    return int(max(process_peak() or 0, now + copied + found.weights, now + found.total))


def _kept(plan: Plan) -> int:
    """Entries of the rows MacDrop keeps a copy of."""
    curriculum, config = plan.recipe.curriculum, plan.skeleton.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    rows = {"massive": curriculum.k, "others": width - curriculum.k, "all": width}[curriculum.scope]
    return int(2 * rows * config.hidden_size * len(plan.places))
