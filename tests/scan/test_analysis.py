"""The definitions, held against their wording on made-up sequences of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mwtool.scan.capture import LayerState
from mwtool.scan.definitions import (
    Thresholds,
    attribution,
    growth,
    largest_origin,
    massive_dimension,
    median,
    peak_layer,
    settled_origin,
    sun,
)

LIMITS = Thresholds()


def state(layer: int, hidden: Sequence[float], added: Sequence[float] = (), z: Sequence[float] = (0.0,)) -> LayerState:
    h = torch.tensor(hidden, dtype=torch.float64)
    written = torch.tensor(added or [0.0] * len(hidden), dtype=torch.float64)
    return LayerState(layer, h, torch.tensor(z, dtype=torch.float64), written)


def peaks(*values: float | tuple[int, float]) -> list[LayerState]:
    """One layer each whose stream is 1 but for an entry, at dimension 0 unless said otherwise."""
    places = [value if isinstance(value, tuple) else (0, value) for value in values]
    return [state(layer, [peak if dim == at else 1.0 for dim in range(6)]) for layer, (at, peak) in enumerate(places)]


VALUES = st.sampled_from([1.0, 99.0, 101.0, 105.0, 109.9, 111.0, 120.0, 1000.0, -101.0, -105.0, -1000.0])
WALKS = st.lists(
    st.one_of(VALUES, st.tuples(st.integers(0, 1), VALUES)),
    min_size=1,
    max_size=14,
).map(lambda values: peaks(*values))
STEADY = st.tuples(WALKS, st.integers(5, 8), VALUES).map(lambda drawn: joined(drawn[0], peaks(*[drawn[2]] * drawn[1])))
"""Any walk, and one that ends in layers which agree: chance alone seldom settles."""


def joined(first: list[LayerState], second: list[LayerState]) -> list[LayerState]:
    return [replace(one, layer=layer) for layer, one in enumerate([*first, *second])]


@given(st.one_of(WALKS, STEADY))
def test_settled_is_what_the_definition_says(states: list[LayerState]) -> None:
    """Layer by layer: massive there, and the same dimension largest and within 10 % in the four that follow."""
    total = len(states)

    def settles(layer: int) -> bool:
        d = massive_dimension(states[layer].hidden, LIMITS)
        if d is None or layer + 4 >= total - 1:
            return False
        for further in states[layer + 1 : layer + 5]:
            change = abs(float(further.hidden[d]) - float(states[layer].hidden[d])) / abs(
                float(states[layer].hidden[d])
            )
            if massive_dimension(further.hidden, LIMITS) != d or change >= 0.1:
                return False
        return True

    first = next((layer for layer in range(total) if settles(layer)), None)
    found = settled_origin(states, total, LIMITS)
    assert (None if found is None else found.layer) == first
    if found is not None:
        assert found.settled
        assert found.dimension == massive_dimension(states[found.layer].hidden, LIMITS)
        assert found.value == float(states[found.layer].hidden[found.dimension])


@given(st.one_of(WALKS, STEADY))
def test_a_walk_that_stops_as_soon_as_it_may_agrees_with_one_to_the_end(states: list[LayerState]) -> None:
    total = len(states)
    whole = settled_origin(states, total, LIMITS)
    stopped = next((n for n in range(1, total + 1) if settled_origin(states[:n], total, LIMITS) is not None), total)
    assert settled_origin(states[:stopped], total, LIMITS) == whole
    assert attribution(states[:stopped], whole) == attribution(states, whole)
    if whole is not None:
        assert stopped == whole.layer + 5  # four further layers and no more
        assert peak_layer(states[: whole.layer + 1]) == peak_layer(states[:stopped][: whole.layer + 1])


@given(st.one_of(WALKS, STEADY), VALUES)
def test_the_last_layer_is_never_counted(states: list[LayerState], written: float) -> None:
    """It writes the massive value down again; whatever it does, the answer stays."""
    total = len(states)
    other = [*states[:-1], replace(peaks(written)[0], layer=total - 1)]
    for origin in (settled_origin, largest_origin):
        assert origin(states, total, LIMITS) == origin(other, total, LIMITS)
    found = largest_origin(states, total, LIMITS)
    assert growth(states, total, found) == growth(other, total, found)


def test_a_change_of_ten_percent_does_not_settle_and_less_does() -> None:
    def settles(*values: float) -> bool:
        return settled_origin(peaks(*values, 1.0), len(values) + 1, LIMITS) is not None

    assert settles(1000, 1000, 1000, 1000, 1099.9)
    assert settles(1000, 900.1, 1000, 1000, 1000)
    assert not settles(1000, 1000, 1000, 1000, 1100)
    assert not settles(1000, 1000, 1000, 1000)
    assert not settles(1000, 1000, -1000, 1000, 1000)


def test_another_dimension_that_takes_over_does_not_settle() -> None:
    states = peaks((0, 1000), (0, 1000), (1, 1000), (0, 1000), (0, 1000), (0, 1000), (0, 1000), (0, 1000), 1)
    found = settled_origin(states, len(states), LIMITS)
    assert found is not None
    assert found.layer == 3


def test_without_settling_the_layer_of_the_largest_entry_serves() -> None:
    states = peaks(1, 200, -3000, 500, 9000)
    assert settled_origin(states, 5, LIMITS) is None
    found = largest_origin(states, 5, LIMITS)
    assert found is not None
    assert (found.layer, found.dimension, found.value, found.settled) == (2, 0, -3000, False)
    assert largest_origin(peaks(1, 2, 9000), 3, LIMITS) is None


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e5), st.booleans())
def test_massive_is_above_both_thresholds(magnitude: float, ratio: float, peak: float, negative: bool) -> None:  # noqa: FBT001 - drawn, never called
    """Median 1: the entry must exceed the magnitude, and the ratio."""
    hidden = torch.tensor([1.0, -peak if negative else peak, 1.0, -1.0, 1.0], dtype=torch.float64)
    found = massive_dimension(hidden, Thresholds(magnitude=magnitude, ratio=ratio))
    largest = 1 if peak > 1 else 0
    assert found == (largest if max(peak, 1.0) > magnitude and max(peak, 1.0) > ratio else None)


def test_exactly_at_a_threshold_is_not_massive() -> None:
    hidden = torch.tensor([0.5, 100.0, 0.5])
    assert massive_dimension(hidden, Thresholds(magnitude=100, ratio=1)) is None
    assert massive_dimension(hidden, Thresholds(magnitude=1, ratio=200)) is None
    assert massive_dimension(hidden, Thresholds(magnitude=99.9, ratio=199.9)) == 1


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert median(torch.tensor([-1.0, 2.0, -4.0, 100.0], dtype=torch.float64)) == 3


def test_shares_are_signed_parts_of_the_settled_value() -> None:
    states = [state(0, [1, -10, 1], [0, 5, 0]), state(1, [1, -1000, 1], [0, -950, 0]), state(2, [1, -999, 1])]
    origin = largest_origin(states, 4, LIMITS)
    assert origin is not None
    assert attribution(states, origin) == (-0.005, 0.95)
    assert attribution(states, None) == ()


def test_growth_is_the_largest_later_value_of_the_same_dimension() -> None:
    states = peaks(1, 1000, 1500, -2000, (1, 9000), 1000, 9999)
    origin = largest_origin(states[:2], 7, LIMITS)
    assert growth(states, 7, origin) == (3, -2000)
    assert growth(states[:2], 7, origin) is None
    assert growth(states, 7, None) is None


def test_the_peak_layer_is_that_of_the_largest_intermediate_entry() -> None:
    assert peak_layer([state(0, [1], z=[3, 1]), state(1, [1], z=[0, -9]), state(2, [1], z=[8, 8])]) == 1


@given(st.one_of(WALKS, STEADY), st.sampled_from([20.0, 100.0, 1000.0, 5000.0]))
def test_the_published_test_lists_every_entry_above_its_thresholds(states: list[LayerState], ratio: float) -> None:
    """The stream's median is 1 wherever one entry stands out."""
    expected = {
        (one.layer, dim, float(value))
        for one in states
        for dim, value in enumerate(one.hidden)
        if abs(float(value)) > 100 and abs(float(value)) > ratio
    }
    found = sun(states, Thresholds(sun_ratio=ratio))
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("total", [1, 2, 4, 5])
def test_a_model_too_short_to_settle_never_does(total: int) -> None:
    assert settled_origin(peaks(*[1000] * total), total, LIMITS) is None
