"""Triggers of massive activations in a text: tokens and positions, bos or not, whose state is massive."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mwtool.scan.given import bundled_or_file
from mwtool.scan.sequences import Taps, run
from mwtool.scan.texts import batches, windows_of, words_of

if TYPE_CHECKING:
    from mwtool.scan.settings import Settings, Thresholds
    from mwtool.scan.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """One token that is massive somewhere.

    seen, massive: how often it occurs, and how often its state is massive; first: how often of that at the first
    position of a window. layer, dimension, value: of its largest entry.
    """

    id: int
    token: str
    seen: int
    massive: int
    first: int
    layer: int
    dimension: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Triggers:
    """What a text holds of them.

    text: its name. windows, length: what was read. massive: positions whose state is massive; first: those at the
    first position of a window. dimensions: (d, at how many positions it is massive), by falling number.
    tokens: those that are massive somewhere, by falling number of massive occurrences.
    """

    text: str
    windows: int
    length: int
    massive: int
    first: int
    dimensions: tuple[tuple[int, int], ...]
    tokens: tuple[Trigger, ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Peaks:
    """Running results of one batch: at every position the dimensions that were massive, and the largest entry.

    entries: (B, T, H); value, layer, dimension: (B, T).
    """

    entries: Tensor
    value: Tensor
    layer: Tensor
    dimension: Tensor


def massive_entries(hidden: Tensor, thresholds: Thresholds) -> Tensor:
    """Which entries of a residual stream, (B, T, H), are massive, (B, T, H): as in `massive_dimensions`."""
    size = hidden.abs().double()
    found = size > thresholds.magnitude
    some = found.any(-1)  # the median is worth its time only there
    if some.any():
        middle = size[some].quantile(0.5, dim=-1, keepdim=True)
        found[some] &= size[some] > thresholds.ratio * middle
    return found


def find_triggers(subject: Subject, settings: Settings) -> Triggers:
    """Every position of the text that the settings name whose state is massive at some layer before the last.

    Read window by window; of each batch of windows one bit an entry is kept, and of the text only counts.
    """
    texts = settings.texts
    assert texts.triggers is not None
    windows, notes = windows_of(subject, bundled_or_file(texts.triggers), texts.length, texts.windows)
    counts = _Counts()
    for ids in batches(windows):
        counts.add(ids, _peaks(subject, settings, ids))
    names = dict(zip(counts.best, words_of(subject, list(counts.best)), strict=True))
    return Triggers(
        text=texts.triggers,
        windows=windows.shape[0],
        length=windows.shape[1],
        massive=sum(counts.massive.values()),
        first=sum(counts.first.values()),
        dimensions=tuple(counts.dimensions.most_common()),
        tokens=tuple(counts.trigger(token, names[token]) for token, _ in counts.massive.most_common()),
        notes=notes,
    )


def _peaks(subject: Subject, settings: Settings, ids: Tensor) -> _Peaks:
    total = len(subject.layers)
    found: list[_Peaks] = []

    def look(layer: int, hidden: Tensor) -> None:
        if not found:
            empty = torch.zeros(hidden.shape[:2], dtype=torch.float64)
            found.append(_Peaks(torch.zeros(hidden.shape, dtype=torch.bool), empty, empty.long(), empty.long()))
        if layer == total - 1:
            return
        entries = massive_entries(hidden, settings.thresholds).cpu()
        found[0].entries |= entries
        values = hidden.cpu().double() * entries  # (B, T, H)
        at = values.abs().argmax(-1, keepdim=True)
        value = values.gather(-1, at)[..., 0]
        larger = value.abs() > found[0].value.abs()
        found[0].value = torch.where(larger, value, found[0].value)
        found[0].layer = torch.where(larger, layer, found[0].layer)
        found[0].dimension = torch.where(larger, at[..., 0], found[0].dimension)

    last = total - 1 if settings.last_layer is None else settings.last_layer
    run(subject, ids, Taps(hidden=look, last=min(last, max(0, total - 2))))
    return found[0]


@dataclass(slots=True, kw_only=True)
class _Counts:
    """Over all batches, by token; best: layer, dimension and value of the largest entry."""

    seen: Counter[int] = field(default_factory=Counter)
    massive: Counter[int] = field(default_factory=Counter)
    first: Counter[int] = field(default_factory=Counter)
    dimensions: Counter[int] = field(default_factory=Counter)
    best: dict[int, tuple[int, int, float]] = field(default_factory=dict)

    def add(self, ids: Tensor, peaks: _Peaks) -> None:
        """Count a batch of windows. ids: (B, T)."""
        self.seen.update(ids.flatten().tolist())
        by_dimension = peaks.entries.sum((0, 1))  # (H,)
        self.dimensions.update({d: int(by_dimension[d]) for d in by_dimension.nonzero()[:, 0].tolist()})
        for window, position in peaks.entries.any(-1).nonzero().tolist():
            token = int(ids[window, position])
            self.massive[token] += 1
            self.first[token] += position == 0
            value = float(peaks.value[window, position])
            if token not in self.best or abs(value) > abs(self.best[token][2]):
                self.best[token] = (int(peaks.layer[window, position]), int(peaks.dimension[window, position]), value)

    def trigger(self, token: int, name: str) -> Trigger:
        """What was counted of one token."""
        layer, dimension, value = self.best[token]
        return Trigger(
            id=token,
            token=name,
            seen=self.seen[token],
            massive=self.massive[token],
            first=self.first[token],
            layer=layer,
            dimension=dimension,
            value=value,
        )
