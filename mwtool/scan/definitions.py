"""The definitions, as functions of captured states: massive, settled, share, growth.

Every function is pure. h_l is the residual stream after layer l (from 0), w_l what its
FFN adds to the stream, both for bos at the first position; docs/definitions.md has the
reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.scan.capture import LayerState
from mwtool.scan.settings import Thresholds

if TYPE_CHECKING:
    from torch import Tensor


CHANGE, WINDOW = 0.1, 4
"""Settled: the largest massive dimension changes by less than 10 % over 4 further layers."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The massive dimension d, the layer l* it is read at, and whether it settled there."""

    layer: int
    dimension: int
    value: float
    settled: bool


def massive_dimension(hidden: Tensor, thresholds: Thresholds) -> int | None:
    """The largest entry of |h| if it is massive: above the magnitude and `ratio` times the median. hidden: (H,)."""
    magnitudes = hidden.abs()
    dimension = int(magnitudes.argmax())
    limit = max(thresholds.magnitude, thresholds.ratio * median(hidden))
    return dimension if float(magnitudes[dimension]) > limit else None


def median(vector: Tensor) -> float:
    """Median of the magnitudes; the mean of the two middle ones where their number is even."""
    return float(vector.abs().quantile(0.5))


def settled_origin(states: Sequence[LayerState], total: int, thresholds: Thresholds) -> Origin | None:
    """The first layer whose massive dimension stays the largest, within 10 %, over 4 further layers.

    The last of `total` layers is never counted: it writes the value down again.
    """
    counted = [state for state in states if state.layer < total - 1]
    dimensions = [massive_dimension(state.hidden, thresholds) for state in counted]
    for at in range(len(counted) - WINDOW):
        dimension = dimensions[at]
        if dimension is None or any(other != dimension for other in dimensions[at : at + WINDOW + 1]):
            continue
        value = float(counted[at].hidden[dimension])
        later = [float(state.hidden[dimension]) for state in counted[at + 1 : at + WINDOW + 1]]
        if all(abs(other / value - 1) < CHANGE for other in later):
            return Origin(counted[at].layer, dimension, value, settled=True)
    return None


def largest_origin(states: Sequence[LayerState], total: int, thresholds: Thresholds) -> Origin | None:
    """Where nothing settles: the layer of the largest massive entry, the last layer excepted."""
    candidates = []
    for state in states:
        dimension = massive_dimension(state.hidden, thresholds)
        if dimension is not None and state.layer < total - 1:
            candidates.append(Origin(state.layer, dimension, float(state.hidden[dimension]), settled=False))
    return max(candidates, key=lambda origin: abs(origin.value), default=None)


def attribution(states: Sequence[LayerState], origin: Origin | None) -> tuple[float, ...]:
    """share_l = w_l[d] / h_l*[d], signed, for l <= l*."""
    if origin is None:
        return ()
    return tuple(float(state.added[origin.dimension]) / origin.value for state in states[: origin.layer + 1])


def growth(states: Sequence[LayerState], total: int, origin: Origin | None) -> tuple[int, float] | None:
    """(layer, value) of the largest |h_l[d]| among the layers walked after l*, the last of all excepted."""
    if origin is None:
        return None
    later = [(s.layer, float(s.hidden[origin.dimension])) for s in states if origin.layer < s.layer < total - 1]
    return max(later, key=lambda pair: abs(pair[1]), default=None)


def peak_layer(states: Sequence[LayerState]) -> int:
    """The layer of the largest |z|: how the paper looks for it."""
    return max(states, key=lambda state: float(state.intermediate.abs().max())).layer


def sun(states: Sequence[LayerState], thresholds: Thresholds) -> list[tuple[int, int, float]]:
    """(layer, dimension, value) of entries above the magnitude and `sun_ratio` times the median (Sun et al. 2024)."""
    found = []
    for state in states:
        limit = max(thresholds.magnitude, thresholds.sun_ratio * median(state.hidden))
        found += [(state.layer, int(d), float(state.hidden[d])) for d in (state.hidden.abs() > limit).nonzero()[:, 0]]
    return found
