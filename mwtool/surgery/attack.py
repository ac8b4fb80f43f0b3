"""Attack rows of one FFN and restore them: zero, retain, scale, or fix them at their mean (paper, section 3).

Row i of ``W_up`` and ``W_gate``, with its biases, produces entry i of the intermediate state. Weights
are edited in place through the views that the architecture adapter describes, so fused, transposed
and expert matrices need no special case, and are restored bit for bit when the block ends, even by
an exception. Where rows cannot be written, hooks override their outputs instead (`mwtool.surgery.hooks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN, WeightSlice
from mwtool.architecture.packed import packed_dtype
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.files.text import shown
from mwtool.interrupts import restored, uninterrupted
from mwtool.surgery.hooks import (
    is_offloaded,
    owner,
    refuse_offloaded,
    refuse_unreadable,
    with_expert_output_added,
    with_loaded_rows_scaled,
    with_outputs_scaled,
    with_state_fixed,
    without_nan,
)

if TYPE_CHECKING:
    from mwtool.massive import RankedRows

Mode = Literal["none", "zero", "retain", "scale", "mean"]


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on the top-k rows.

    mode: `none`; `zero` the rows; `retain` only them (zero all others); `scale` them by `factor`; fix
    their intermediate values at their `mean`.
    k: number of rows in each layer. k = 0 changes nothing, except that retaining 0 rows zeroes them all (paper,
    Figure 4). layers: decoder layers, counted from 0, that are attacked together; empty: the massive layer, or the one
    that the caller chooses.
    """

    mode: Mode = "none"
    k: int = 0
    factor: float | None = None
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.mode == "none":
            return self.name
        return f"{self.name}:{self.k}" + (f"@{'+'.join(map(str, self.layers))}" if self.layers else "")

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
    """Parse `none`, `zero:3`, `retain:5`, `mean:5` or `scale:0.5:3` (factor, then k), with `@2` or `@2+11` for layers.

    Raises BadValue for any other text.
    """
    expected = "expected none, zero:K, retain:K, mean:K or scale:X:K, with @LAYER or @LAYER+LAYER for other layers"
    if text == "none":
        return Attack()
    head, at, place = text.partition("@")
    mode, _, k = head.rpartition(":")
    parsed, layers = _mode(mode), place.split("+") if at else []
    if parsed is None or not all(_is_number(part) for part in (k, *layers)):
        raise BadValue(f"unknown attack {shown(text)}; {expected}")
    numbers = tuple(map(int, layers))
    if len(set(numbers)) < len(numbers):
        raise BadValue(f"attack {text!r} names a layer twice; expected distinct layers")
    return replace(parsed.at(int(k)), layers=numbers)


def _is_number(text: str) -> bool:
    """Whether it is a non-negative integer of at most nine digits."""
    return text.isascii() and text.isdigit() and len(text) <= 9  # noqa: PLR2004 - nine digits are beyond any layer or k


def parse_mode(text: str) -> Attack:
    """Parse `zero`, `retain`, `mean` or `scale:X` as an attack with k = 0. Raises BadValue for any other text."""
    parsed = _mode(text)
    if parsed is None:
        raise BadValue(
            f"unknown mode {shown(text)}; expected zero, retain, mean or scale:X, where X is a finite number"
        )
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


def rows_of(massive: RankedRows, attack: Attack) -> tuple[int, ...]:
    """The first k ranked rows. Raises BadValue if fewer were ranked, or k is negative."""
    if attack.k < 0:
        raise BadValue(f"k is {attack.k}; expected 0 or more")
    if attack.k > len(massive.indices):
        raise BadValue(
            f"{attack} needs {attack.k} ranked rows and the scan ranked {len(massive.indices)}; scan with -k {attack.k}"
        )
    return massive.indices[: attack.k]


@dataclass(frozen=True, slots=True)
class Edit:
    """Rows of one FFN that an attack takes.

    rows: indices into the intermediate state; the caller takes the first k of the ranked ones.
    means: the mean of each intermediate entry, (I,), as `mwtool.surgery.hooks.averaging` measures it; for `mean` alone.
    """

    ffn: FFN
    rows: tuple[int, ...]
    means: Tensor | None = None


@contextmanager
def edited(
    model: nn.Module, ffn: FFN, rows: Sequence[int], attack: Attack, *, means: Tensor | None = None
) -> Iterator[None]:
    """Attack `rows` of one FFN inside the block, as `edited_together` does. means: (I,), for `mean` alone."""
    with edited_together(model, [Edit(ffn, tuple(rows), means)], attack):
        yield


@restored
def edited_together(model: nn.Module, edits: Sequence[Edit], attack: Attack) -> Iterator[None]:
    """The model with rows of several FFNs attacked inside the block; all are restored bit for bit, however it ends.

    model: the module whose parameters the adapter names (under PEFT its base model).
    Several edits of one FFN are one edit of all their rows. Raises BadValue for an index out of range,
    UnsupportedModel where rows cannot be attacked; nothing is changed then.
    """
    chosen = [
        (edit, rows)
        for edit in merged_edits(edits)
        if (rows := attacked_rows(edit.rows, edit.ffn.width(model), attack))
    ]
    if attack.mode == "none" or not chosen:
        yield
        return
    factor = attack.factor if attack.mode == "scale" and attack.factor is not None else 0.0
    written: list[tuple[FFN, list[int]]] = []
    hooks: list[AbstractContextManager[None]] = []
    for edit, rows in chosen:
        if attack.mode == "mean":
            hooks.append(_fixed(model, edit, rows))
        elif is_offloaded(model, edit.ffn):
            hooks.append(with_loaded_rows_scaled(model, edit.ffn, places(edit.ffn), rows, factor))
            continue
        elif _packed(model, edit.ffn):
            hooks.append(with_outputs_scaled(model, edit.ffn, rows, factor))
        if edit.ffn.expert is not None if attack.mode == "mean" else not _packed(model, edit.ffn):
            written.append((edit.ffn, rows))
    with _rewritten(model, written, factor), ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


def merged_edits(edits: Sequence[Edit]) -> list[Edit]:
    """Merge the edits of the same FFN."""
    found: dict[tuple[str, int | None], Edit] = {}
    for edit in edits:
        key = (edit.ffn.module, edit.ffn.expert)
        before = found.get(key)
        found[key] = edit if before is None else replace(before, rows=(*before.rows, *edit.rows))
    return list(found.values())


def _fixed(model: nn.Module, edit: Edit, selected: list[int]) -> AbstractContextManager[None]:
    """Fix the intermediate values of these rows at their means; for a routed expert, besides zeroing its rows."""
    ffn = edit.ffn
    if edit.means is None:
        raise BadValue("mean needs the mean values of the rows; none were given")
    if ffn.expert is None:
        return with_state_fixed(model, ffn, selected, edit.means)
    refuse_unreadable(model, ffn)
    if hasattr(owner(model, ffn.up), "get_base_layer"):
        raise UnsupportedModel(
            f"{ffn.module} has a PEFT adapter, whose contribution a mean cannot replace; use --on merged"
        )
    return with_expert_output_added(model, ffn, selected, edit.means)


@restored
def _rewritten(model: nn.Module, written: Sequence[tuple[FFN, list[int]]], factor: float) -> Iterator[None]:
    """Rows of each FFN and their biases times `factor` inside the block, and bit for bit what they were after it."""
    views: list[Tensor] = []
    index: list[Tensor] = []
    for ffn, selected in written:
        for place in places(ffn):
            views.append(place.read(model))
            index.append(torch.tensor(selected, device=views[-1].device))
    kept = [view[at].clone() for view, at in zip(views, index, strict=True)]
    try:
        try:
            for view, at, rows in zip(views, index, kept, strict=True):
                view[at] = rows * factor if factor else torch.zeros_like(rows)
            with ExitStack() as stack:
                for ffn, selected in written:
                    stack.enter_context(without_nan(model, ffn, selected))
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
