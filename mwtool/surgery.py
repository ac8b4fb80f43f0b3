"""Attack rows of one FFN, and put them back: zero, retain, scale or fix them (paper, section 3).

Row i of ``W_up`` and ``W_gate``, with its biases, makes intermediate entry i. Weights are
edited in place through the adapter's views, so fused, transposed and expert matrices
are served alike, and restored bit for bit when the block ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.layout import FFN

if TYPE_CHECKING:
    from mwtool.massive import MassiveWeights

Mode = Literal["none", "zero", "retain", "scale", "mean"]


@dataclass(frozen=True, slots=True)
class Attack:
    """What is done to the top-k rows.

    `none`; `zero` them; `retain` only them (zero all others); `scale` them by `factor`; fix
    their intermediate values at their `mean`.

    k = 0 is no attack, except that retaining 0 rows zeroes them all (paper, Figure 4).
    """

    mode: Mode = "none"
    k: int = 0
    factor: float | None = None

    def __str__(self) -> str:
        if self.mode == "none":
            return "none"
        factor = "" if self.factor is None else f":{self.factor:g}"
        return f"{self.mode}{factor}:{self.k}"


def parse_attack(text: str) -> Attack:
    """`none`, `zero:3`, `retain:5`, `mean:5` or `scale:0.5:3` (factor, then k).

    Raises BadValue, saying what was expected.
    """
    mode, *values = text.split(":")
    if mode == "none" and not values:
        return Attack()
    expected = {"zero": 1, "retain": 1, "mean": 1, "scale": 2}
    try:
        if mode in expected and len(values) == expected[mode] and int(values[-1]) >= 0:
            return Attack(mode, int(values[-1]), float(values[0]) if mode == "scale" else None)  # type: ignore[arg-type] # checked above
    except ValueError:
        pass
    raise BadValue(f"attack {text!r} is not understood; expected none, zero:K, retain:K, mean:K or scale:X:K")


@contextmanager
def edited(model: nn.Module, ffn: FFN, rows: Sequence[int], attack: Attack) -> Iterator[None]:
    """The model with `rows` of `ffn` attacked inside the block.

    model: the module whose parameters the adapter names (under PEFT its base model).
    rows: indices into the intermediate state; the caller takes the first k of the ranked ones.
    Raises BadValue for an index out of range, UnsupportedModel where rows cannot be written.
    """
    if attack.mode == "none":
        yield
        return
    with torch.no_grad():
        views = [_writable(model, ffn, place) for place in (*ffn.inputs, ffn.up_bias, ffn.gate_bias) if place]
        selected = _selected(rows, views[0].shape[0], attack, views[0].device)
        kept = [view[selected].clone() for view in views]
    factor = attack.factor if attack.mode == "scale" and attack.factor is not None else 0.0
    try:
        with torch.no_grad():
            for view in views:
                view[selected] = view[selected] * factor if factor else torch.zeros_like(view[selected])
        yield
    finally:
        _put_back(views, selected, kept)


def rows_of(massive: MassiveWeights, attack: Attack) -> tuple[int, ...]:
    """The first k ranked rows; raises BadValue where fewer were ranked."""
    if attack.k > len(massive.indices):
        raise BadValue(
            f"{attack} needs {attack.k} ranked rows; the scan ranked {len(massive.indices)}: scan with -k {attack.k}"
        )
    return massive.indices[: attack.k]


def _selected(rows: Sequence[int], width: int, attack: Attack, device: torch.device) -> Tensor:
    """Indices of the rows to write, (n,): those given, or all others for `retain`."""
    outside = [row for row in rows if not 0 <= row < width]
    if outside:
        raise BadValue(f"row {outside[0]} does not exist; the FFN has rows 0 to {width - 1}")
    chosen = torch.zeros(width, dtype=torch.bool)
    chosen[list(rows)] = True
    if attack.mode == "retain":
        chosen = ~chosen
    return chosen.nonzero()[:, 0].to(device)


def _writable(model: nn.Module, ffn: FFN, place: object) -> Tensor:
    view: Tensor = place.read(model)  # type: ignore[attr-defined] # a WeightSlice
    if view.is_meta:
        raise UnsupportedModel(f"{ffn.module} is offloaded and cannot be edited; load the model without offloading it")
    if not view.is_floating_point():
        raise UnsupportedModel(f"{ffn.module} holds packed {view.dtype} weights, whose rows cannot be written")
    return view


def _put_back(views: list[Tensor], selected: Tensor, kept: list[Tensor]) -> None:
    """Restore; a second Ctrl-C in the middle must not leave half of it done."""
    try:
        _copy(views, selected, kept)
    except BaseException:
        _copy(views, selected, kept)
        raise


@torch.no_grad()
def _copy(views: list[Tensor], selected: Tensor, kept: list[Tensor]) -> None:
    for view, rows in zip(views, kept, strict=True):
        view[selected] = rows
