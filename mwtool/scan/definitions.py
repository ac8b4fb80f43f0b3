"""The definitions of a scan as pure functions of captured states: massive dimensions, events, the massive layer.

Notation, all for bos alone at the first position: h_l is the residual stream after decoder layer l (from 0), z_l the
FFN's intermediate state, w_l what the FFN adds to the stream. docs/definitions.md gives the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mwtool.massive import MassiveWeights
from mwtool.scan.capture import LayerState
from mwtool.scan.settings import Thresholds

if TYPE_CHECKING:
    from torch import Tensor


PART = 0.1
"""Condition (B): the FFN writes at least this part of the largest |h_j[d]|, j before the last layer."""

Kind = Literal["up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """What one layer's FFN does to one massive dimension d.

    kind: `up` if |h_l[d]| > |h_l[d] - w_l[d]|, else `down`; flip: whether h_l[d] and h_l[d] - w_l[d] differ in sign.
    written: w_l[d], what the FFN adds to the stream; before: h_l[d] - w_l[d]; after: h_l[d].
    lives: for `up`, layers until |h_j[d]| < |h_l[d]| / 2; None if that does not happen in the layers walked, or `down`.
    """

    dimension: int
    kind: Kind
    flip: bool
    written: float
    before: float
    after: float
    lives: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Write):
    """One layer's FFN writing a large part of a massive dimension into the residual stream, or taking it out.

    `dimension` and the fields of `Write` are those of the massive dimension this layer writes most to.

    layer: the decoder layer, from 0.
    others: the other massive dimensions this layer writes a large part of, by falling |w_l[d]|.
    rows: the top rows by |z| of the network that contributes most to w_l[d], with their shares of its output at d.
    """

    layer: int
    others: tuple[Write, ...]
    rows: MassiveWeights


@dataclass(frozen=True, slots=True)
class Trace:
    """One dimension of the stream over the layers walked. values: h_l[d]; written: w_l[d]; both by layer."""

    dimension: int
    values: tuple[float, ...]
    written: tuple[float, ...]


Absence = Literal["no massive dimension", "not written by an FFN", "written only in the last layer"]
"""Why a scan names no massive layer."""


def median(vector: Tensor) -> float:
    """Median of the magnitudes of a vector, (N,): the mean of the two middle ones if N is even."""
    return float(vector.abs().quantile(0.5))


def massive_dimensions(states: Sequence[LayerState], total: int, thresholds: Thresholds) -> tuple[int, ...]:
    """Dimensions d with |h_l[d]| above both thresholds at some layer before the last of `total`, ascending."""
    found: set[int] = set()
    for state in _before_last(states, total):
        limit = max(thresholds.magnitude, thresholds.ratio * median(state.hidden))
        found.update((state.hidden.abs() > limit).nonzero()[:, 0].tolist())
    return tuple(sorted(found))


def traces(states: Sequence[LayerState], dimensions: Sequence[int]) -> tuple[Trace, ...]:
    """Value and FFN contribution of each dimension at every layer walked."""
    return tuple(
        Trace(
            dimension,
            tuple(float(state.hidden[dimension]) for state in states),
            tuple(float(state.added[dimension]) for state in states),
        )
        for dimension in dimensions
    )


def writes(
    states: Sequence[LayerState], total: int, dimensions: Sequence[int], thresholds: Thresholds
) -> dict[int, tuple[Write, ...]]:
    """Layer -> the massive dimensions its FFN writes a large part of, by falling |w_l[d]|; only layers with any.

    A large part is (A) |w_l[d]| > magnitude and > ratio * median|h_l|, or (B) |w_l[d]| >= 10 % of the largest |h_j[d]|,
    j before the last of `total` layers. The first of each tuple is the layer's event.
    """
    found: dict[int, tuple[Write, ...]] = {}
    peaks = {d: max(abs(float(state.hidden[d])) for state in _before_last(states, total)) for d in dimensions}
    for at, state in enumerate(states):
        limit = max(thresholds.magnitude, thresholds.ratio * median(state.hidden))
        large = [
            _write(states, at, d)
            for d in dimensions
            if abs(float(state.added[d])) > limit or abs(float(state.added[d])) >= PART * peaks[d]
        ]
        if large:
            found[state.layer] = tuple(sorted(large, key=lambda one: -abs(one.written)))
    return found


def write_at(states: Sequence[LayerState], layer: int, dimensions: Sequence[int]) -> Write:
    """What a layer does to the one of `dimensions` it writes most to; of all H if there are none."""
    added = states[layer].added
    return _write(states, layer, max(dimensions or range(added.numel()), key=lambda d: abs(float(added[d]))))


def _write(states: Sequence[LayerState], at: int, dimension: int) -> Write:
    after, written = float(states[at].hidden[dimension]), float(states[at].added[dimension])
    before = after - written
    kind: Kind = "up" if abs(after) > abs(before) else "down"
    later = (state.layer for state in states[at + 1 :] if abs(float(state.hidden[dimension])) < abs(after) / 2)
    halved = next(later, None) if kind == "up" else None
    return Write(
        dimension=dimension,
        kind=kind,
        flip=after * before < 0,
        written=written,
        before=before,
        after=after,
        lives=None if halved is None else halved - states[at].layer,
    )


def massive_event(events: Sequence[Event], total: int) -> Event | None:
    """The `up` event before the last of `total` layers with the largest |z|; the earlier of two that are equal."""
    candidates = [event for event in events if event.kind == "up" and event.layer < total - 1]
    return max(candidates, key=lambda event: event.rows.magnitudes[0], default=None)


def absence(events: Sequence[Event], dimensions: Sequence[int], total: int) -> Absence | None:
    """Why there is no massive layer; None where there is one."""
    if massive_event(events, total) is not None:
        return None
    if not dimensions:
        return "no massive dimension"
    return "written only in the last layer" if any(e.kind == "up" for e in events) else "not written by an FFN"


def sun(states: Sequence[LayerState], thresholds: Thresholds) -> list[tuple[int, int, float]]:
    """(layer, dimension, value) of entries above the magnitude and `sun_ratio` times the median (Sun et al. 2024)."""
    found = []
    for state in states:
        limit = max(thresholds.magnitude, thresholds.sun_ratio * median(state.hidden))
        found += [(state.layer, int(d), float(state.hidden[d])) for d in (state.hidden.abs() > limit).nonzero()[:, 0]]
    return found


def _before_last(states: Sequence[LayerState], total: int) -> list[LayerState]:
    return [state for state in states if state.layer < total - 1]
