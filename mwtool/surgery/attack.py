"""Attack rows of one FFN and restore them: zero, retain, scale, or fix them at their mean (paper, section 3).

Row i of ``W_up`` and ``W_gate``, with its biases, produces entry i of the intermediate state. Weights
are edited in place through the views that the architecture adapter describes, so fused, transposed
and expert matrices need no special case, and are restored bit for bit when the block ends, even by
an exception. Where rows cannot be written, hooks override their outputs instead (`mwtool.surgery.hooks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, WeightSlice
from mwtool.architecture.packed import packed_dtype
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.interrupts import uninterrupted
from mwtool.surgery.hooks import (
    owner,
    refuse_offloaded,
    refuse_unreadable,
    with_expert_output_added,
    with_outputs_scaled,
    with_state_fixed,
    without_nan,
)

if TYPE_CHECKING:
    from mwtool.massive import MassiveWeights

Mode = Literal["none", "zero", "retain", "scale", "mean"]


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on the top-k rows.

    mode: `none`; `zero` the rows; `retain` only them (zero all others); `scale` them by `factor`; fix
    their intermediate values at their `mean`.
    k: number of rows. k = 0 changes nothing, except that retaining 0 rows zeroes them all (paper, Figure 4).
    """

    mode: Mode = "none"
    k: int = 0
    factor: float | None = None

    def __str__(self) -> str:
        return self.name if self.mode == "none" else f"{self.name}:{self.k}"

    @property
    def name(self) -> str:
        """The mode with its factor, without k: `zero`, `scale:0.5`."""
        return self.mode if self.factor is None else f"{self.mode}:{self.factor:g}"

    @property
    def idle(self) -> bool:
        """Whether the attack changes nothing."""
        return self.mode == "none" or (self.k == 0 and self.mode != "retain")

    def at(self, k: int) -> Attack:
        """The same attack on k rows."""
        return replace(self, k=k)


def parse_attack(text: str) -> Attack:
    """Parse `none`, `zero:3`, `retain:5`, `mean:5` or `scale:0.5:3` (factor, then k).

    Raises BadValue for any other text.
    """
    expected = "expected none, zero:K, retain:K, mean:K or scale:X:K"
    if text == "none":
        return Attack()
    mode, _, k = text.rpartition(":")
    parsed = _mode(mode)
    if parsed is None or not (k.isascii() and k.isdigit()):
        raise BadValue(f"unknown attack {text!r}; {expected}")
    return parsed.at(int(k))


def parse_mode(text: str) -> Attack:
    """Parse `zero`, `retain`, `mean` or `scale:X` as an attack with k = 0. Raises BadValue for any other text."""
    parsed = _mode(text)
    if parsed is None:
        raise BadValue(f"unknown mode {text!r}; expected zero, retain, mean or scale:X, where X is a finite number")
    return parsed


def _mode(text: str) -> Attack | None:
    mode, _, factor = text.partition(":")
    if text in ("zero", "retain", "mean"):
        return Attack(cast("Mode", text))
    try:
        value = float(factor)
    except ValueError:
        return None
    return Attack("scale", 0, value) if mode == "scale" and math.isfinite(value) else None


def rows_of(massive: MassiveWeights, attack: Attack) -> tuple[int, ...]:
    """The first k ranked rows. Raises BadValue if fewer were ranked, or k is negative."""
    if attack.k < 0:
        raise BadValue(f"k is {attack.k}; expected 0 or more")
    if attack.k > len(massive.indices):
        raise BadValue(
            f"{attack} needs {attack.k} ranked rows and the scan ranked {len(massive.indices)}; scan with -k {attack.k}"
        )
    return massive.indices[: attack.k]


@contextmanager
def edited(
    model: nn.Module, ffn: FFN, rows: Sequence[int], attack: Attack, *, means: Tensor | None = None
) -> Iterator[None]:
    """The model with `rows` of `ffn` attacked inside the block.

    model: the module whose parameters the adapter names (under PEFT its base model).
    rows: indices into the intermediate state; the caller takes the first k of the ranked ones.
    means: the mean of each intermediate entry, (I,), as `override.averaging` gathers it; for `mean` alone.
    Raises BadValue for an index out of range, UnsupportedModel where rows cannot be attacked.
    """
    selected = attacked_rows(rows, ffn.width(model), attack)
    with _attacked(model, ffn, selected, attack, means) if selected and attack.mode != "none" else nullcontext():
        yield


def _attacked(
    model: nn.Module, ffn: FFN, selected: list[int], attack: Attack, means: Tensor | None
) -> AbstractContextManager[None]:
    if attack.mode == "mean":
        return _fixed(model, ffn, selected, means)
    factor = attack.factor if attack.mode == "scale" and attack.factor is not None else 0.0
    if _packed(model, ffn):
        return with_outputs_scaled(model, ffn, selected, factor)
    return _rewritten(model, ffn, selected, factor)


@contextmanager
def _fixed(model: nn.Module, ffn: FFN, selected: list[int], means: Tensor | None) -> Iterator[None]:
    """Intermediate values of these rows at their means; a routed expert gives them beside its zeroed rows."""
    if means is None:
        raise BadValue("mean needs the mean values of the rows; none were given")
    if ffn.expert is None:
        with with_state_fixed(model, ffn, selected, means):
            yield
        return
    refuse_unreadable(model, ffn)
    if hasattr(owner(model, ffn.up), "get_base_layer"):
        raise UnsupportedModel(
            f"{ffn.module} has a PEFT adapter, whose contribution a mean cannot replace; use --on merged"
        )
    with _rewritten(model, ffn, selected, 0.0), with_expert_output_added(model, ffn, selected, means):
        yield


@contextmanager
def _rewritten(model: nn.Module, ffn: FFN, selected: list[int], factor: float) -> Iterator[None]:
    """Rows and their biases times `factor` inside the block, and bit for bit what they were after it."""
    views = [place.read(model) for place in places(ffn)]
    index = [torch.tensor(selected, device=view.device) for view in views]
    kept = [view[at].clone() for view, at in zip(views, index, strict=True)]
    try:
        try:
            for view, at, rows in zip(views, index, kept, strict=True):
                view[at] = rows * factor if factor else torch.zeros_like(rows)
            with without_nan(model, ffn, selected):
                yield
        finally:
            uninterrupted(partial(_put_back, views, index, kept))
    except KeyboardInterrupt:  # a second one may have come before restoring began
        uninterrupted(partial(_put_back, views, index, kept))
        raise


def places(ffn: FFN) -> tuple[WeightSlice, ...]:
    """The weights that produce the intermediate state: up, gate, and their biases."""
    return (*ffn.inputs, *(bias for bias in (ffn.up_bias, ffn.gate_bias) if bias is not None))


def attacked_rows(rows: Sequence[int], width: int, attack: Attack) -> list[int]:
    """The rows to change, sorted: those given, or all others for `retain`.

    width: rows of the FFN, I. Raises BadValue for a row outside 0 to I - 1.
    """
    outside = [row for row in rows if not 0 <= row < width]
    if outside:
        raise BadValue(f"row {outside[0]} does not exist; the FFN has rows 0 to {width - 1}")
    given = set(rows)
    return [row for row in range(width) if row not in given] if attack.mode == "retain" else sorted(given)


def _packed(model: nn.Module, ffn: FFN) -> bool:
    """Whether the rows are quantized and so cannot be written. Raises UnsupportedModel if they are offloaded."""
    refuse_offloaded(model, ffn)
    return any(packed_dtype(model, place) for place in places(ffn))


def _put_back(views: list[Tensor], index: list[Tensor], kept: list[Tensor]) -> None:
    for view, at, rows in zip(views, index, kept, strict=True):
        view[at] = rows
