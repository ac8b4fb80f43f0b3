"""The definitions, compared with a plain re-implementation of their wording on made-up sequences of states."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mwtool.massive import MassiveWeights
from mwtool.scan.capture import LayerState
from mwtool.scan.definitions import (
    Event,
    Thresholds,
    Write,
    absence,
    massive_dimensions,
    massive_event,
    median,
    sun,
    traces,
    write_at,
    writes,
)
from mwtool.scan.ranking import massive_count

LIMITS = Thresholds()
WIDTH = 6


def state(layer: int, hidden: Sequence[float], added: Sequence[float] = ()) -> LayerState:
    h = torch.tensor(hidden, dtype=torch.float64)
    w = torch.tensor(added or [0.0] * len(hidden), dtype=torch.float64)
    return LayerState(layer=layer, hidden=h, intermediate=torch.zeros(1, dtype=torch.float64), added=w)


VALUES = st.sampled_from([0.0, 1.0, -2.0, 9.0, 10.0, 11.0, 50.0, 99.0, 101.0, -101.0, 120.0, -1000.0, 1000.0, 24960.0])
VECTORS = st.lists(VALUES, min_size=WIDTH, max_size=WIDTH)
WALKS = st.lists(st.tuples(VECTORS, VECTORS), min_size=1, max_size=9).map(
    lambda drawn: [state(layer, hidden, added) for layer, (hidden, added) in enumerate(drawn)]
)
LIMIT = st.builds(Thresholds, magnitude=st.sampled_from([1.0, 100.0, 500.0]), ratio=st.sampled_from([0.5, 50.0, 100.0]))


def plainly(states: list[LayerState], total: int, limits: Thresholds) -> dict[int, list[dict[str, Any]]]:
    """Layer -> its writes by falling |w|, from the text of docs/definitions.md in plain Python."""
    h = [one.hidden.tolist() for one in states]
    w = [one.added.tolist() for one in states]
    middle = [statistics.median(abs(value) for value in vector) for vector in h]
    early = [layer for layer in range(len(states)) if layer < total - 1]
    massive = [
        d
        for d in range(WIDTH)
        if any(abs(h[j][d]) > limits.magnitude and abs(h[j][d]) > limits.ratio * middle[j] for j in early)
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    for layer in range(len(states)):
        for d in massive:
            size, after = abs(w[layer][d]), h[layer][d]
            large = size > limits.magnitude and size > limits.ratio * middle[layer]
            if not large and size < 0.1 * max(abs(h[j][d]) for j in early):
                continue
            before = after - w[layer][d]
            up = abs(after) > abs(before)
            lives = [j - layer for j in range(layer + 1, len(states)) if abs(h[j][d]) < abs(after) / 2]
            found.setdefault(layer, []).append(
                {
                    "dimension": d,
                    "kind": "up" if up else "down",
                    "flip": after * before < 0,
                    "written": w[layer][d],
                    "before": before,
                    "after": after,
                    "lives": lives[0] if up and lives else None,
                }
            )
    return {layer: sorted(some, key=lambda one: -abs(one["written"])) for layer, some in found.items()}


def as_dict(one: Write) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Write.__slots__}


@given(WALKS, st.integers(0, 2), LIMIT)
def test_writes_are_what_the_definition_says(states: list[LayerState], unseen: int, limits: Thresholds) -> None:
    """Also where the walk ended before the model's last layer."""
    total = len(states) + unseen
    dimensions = massive_dimensions(states, total, limits)
    found = writes(states, total, dimensions, limits)
    assert {layer: [as_dict(one) for one in some] for layer, some in found.items()} == plainly(states, total, limits)


@given(WALKS, VECTORS)
def test_the_last_layer_makes_no_dimension_massive(states: list[LayerState], other: list[float]) -> None:
    total = len(states)
    changed = [*states[:-1], state(total - 1, other)]
    assert massive_dimensions(states, total, LIMITS) == massive_dimensions(changed, total, LIMITS)


@given(WALKS)
def test_flip_and_kind_do_not_depend_on_the_sign_of_the_stream(states: list[LayerState]) -> None:
    total = len(states)
    mirrored = [replace(one, hidden=-one.hidden, added=-one.added) for one in states]
    ours = writes(states, total, massive_dimensions(states, total, LIMITS), LIMITS)
    theirs = writes(mirrored, total, massive_dimensions(mirrored, total, LIMITS), LIMITS)

    def signless(found: dict[int, tuple[Write, ...]]) -> dict[int, list[Any]]:
        return {layer: [(w.dimension, w.kind, w.flip, w.lives) for w in some] for layer, some in found.items()}

    assert signless(ours) == signless(theirs)


def test_a_value_erased_and_written_again_gives_three_events_and_lives_as_long_as_it_stands() -> None:
    """The course of SmolLM2's dimension 507, shortened."""
    course = [(1, 0), (292, 249), (768, 476), (764, 0), (36, -560), (24960, 24960), (24900, 0), (10560, -14144), (4, 0)]
    states = [state(layer, [h, 1, 1, 1, 1], [w, 0, 0, 0, 0]) for layer, (h, w) in enumerate(course)]
    found = writes(states, len(states), (0,), LIMITS)
    assert [(layer, one.kind, one.lives) for layer, (one,) in found.items()] == [
        (1, "up", 3),
        (2, "up", 2),
        (4, "down", None),
        (5, "up", 2),
        (7, "down", None),
    ]
    assert (found[1][0].before, found[1][0].after) == (43, 292)


def test_what_attention_writes_is_no_event_and_does_not_change_the_label() -> None:
    """Attention takes the value from 1 to 500 and the FFN back to 300: down, although the layer leaves more than 1."""
    states = [state(0, [1, 1, 1]), state(1, [500, 1, 1]), state(2, [300, 1, 1], [-400, 0, 0]), state(3, [1, 1, 1])]
    found = writes(states, 4, massive_dimensions(states, 4, LIMITS), LIMITS)
    assert [(layer, one.kind, one.before) for layer, (one,) in found.items()] == [(2, "down", 700)]


def test_a_tenth_of_the_largest_value_counts_and_less_does_not() -> None:
    """Condition (B), for streams whose writes stay below 100."""
    for size, expected in ((15.1, 1), (15.0, 1), (14.9, 0)):
        states = [state(0, [size, 9, 9], [size, 0, 0]), state(1, [150, 1, 1]), state(2, [1, 1, 1])]
        assert len(writes(states, 3, massive_dimensions(states, 3, LIMITS), LIMITS)) == expected


def test_the_dimension_written_most_comes_first() -> None:
    states = [state(0, [0, 300, -900, 1, 1, 1], [0, 300, -900, 0, 0, 0]), state(1, [1] * 6)]
    (found,) = writes(states, 2, massive_dimensions(states, 2, LIMITS), LIMITS).values()
    assert [one.dimension for one in found] == [2, 1]
    assert write_at(states, 0, (1, 2)).dimension == 2
    assert write_at(states, 0, ()).dimension == 2


def test_traces_hold_value_and_contribution_at_every_layer() -> None:
    states = [state(0, [5, 6], [1, 2]), state(1, [7, 8], [3, 4])]
    (trace,) = traces(states, [1])
    assert (trace.dimension, trace.values, trace.written) == (1, (6, 8), (2, 4))


def event(layer: int, z: float, kind: Any = "up") -> Event:
    rows = MassiveWeights(
        layer=layer,
        module="mlp",
        expert=None,
        indices=(0,),
        magnitudes=(z,),
        shares=(1.0,),
        median=1.0,
        count=1,
        share_of_parameters=0.1,
        dimension=0,
        value=200.0,
    )
    return Event(
        layer=layer,
        dimension=0,
        kind=kind,
        flip=False,
        written=200.0,
        before=0.0,
        after=200.0,
        lives=None,
        others=(),
        rows=rows,
    )


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event(1, 50), event(3, 3072), event(5, 9)], 3),
        ([event(1, 50), event(3, 3072, "down")], 1),
        ([event(1, 50), event(3, 50)], 1),
        ([event(1, 50), event(7, 3072)], 1),
        ([event(7, 3072)], None),
        ([event(1, 50, "down")], None),
        ([], None),
    ],
    ids=["largest z", "down never", "earlier of equals", "last layer never", "only last", "only down", "none"],
)
def test_the_massive_layer_is_the_up_event_with_the_largest_z(events: list[Event], expected: int | None) -> None:
    found = massive_event(events, 8)
    assert (None if found is None else found.layer) == expected


def test_why_there_is_no_massive_layer() -> None:
    assert absence([], [], 8) == "no massive dimension"
    assert absence([], [3], 8) == "not written by an FFN"
    assert absence([event(2, 9, "down")], [3], 8) == "not written by an FFN"
    assert absence([event(7, 9)], [3], 8) == "written only in the last layer"
    assert absence([event(2, 9)], [3], 8) is None


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e5), st.booleans())
def test_massive_is_above_both_thresholds(magnitude: float, ratio: float, peak: float, negative: bool) -> None:  # noqa: FBT001 - drawn, never called
    """Median 1: the entry must exceed the magnitude, and the ratio."""
    states = [state(0, [1.0, -peak if negative else peak, 1.0, -1.0, 1.0])]
    found = massive_dimensions(states, 2, Thresholds(magnitude=magnitude, ratio=ratio))
    assert (1 in found) == (peak > magnitude and peak > ratio)


def test_exactly_at_a_threshold_is_not_massive() -> None:
    states = [state(0, [0.5, 100.0, 0.5])]
    assert massive_dimensions(states, 2, Thresholds(magnitude=100, ratio=1)) == ()
    assert massive_dimensions(states, 2, Thresholds(magnitude=1, ratio=200)) == ()
    assert massive_dimensions(states, 2, Thresholds(magnitude=99.9, ratio=199.9)) == (1,)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert median(torch.tensor([-1.0, 2.0, -4.0, 100.0], dtype=torch.float64)) == 3


def count(shares: Sequence[float]) -> int:
    """Of rows already in order of |z|."""
    z = torch.arange(len(shares), 0, -1, dtype=torch.float64) * 100
    return massive_count(z, torch.tensor(shares, dtype=torch.float64) / z)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0], 1),
        ([0.89, 0.002, 0.002, 0.05, 0.056], 1),
        ([0.725, 0.271, 0.004], 2),
        ([0.6, 0.1, 0.09, 0.08, 0.05, 0.08], 4),
        ([0.6, 0.001, 0.35, 0.049], 3),
        ([0.01] * 100, 90),
        ([1.6, -0.5, -0.1], 1),
        ([-0.05, 0.3, 0.75], 3),
        ([0.0, 0.0], 0),
    ],
)
def test_count_is_the_fewest_rows_that_carry_it_without_a_tail_of_small_ones(
    shares: list[float], expected: int
) -> None:
    assert count(shares) == expected


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12))
@example([0.89, 0.002, 0.002, 0.05, 0.056])
def test_count_agrees_with_its_wording(weights: list[float]) -> None:
    shares = [weight / sum(weights) for weight in weights]
    prefix = next(n for n in range(1, len(shares) + 1) if sum(shares[:n]) >= 0.9 - 1e-12)
    if abs(sum(shares[:prefix]) - 0.9) < 1e-9 or any(abs(s - max(shares[:prefix]) / 10) < 1e-9 for s in shares):
        return  # the last bit of a float decides
    notable = [n for n in range(1, prefix + 1) if shares[n - 1] >= max(shares[:prefix]) / 10]
    assert count(shares) == notable[-1]


@given(WALKS, st.sampled_from([20.0, 100.0, 1000.0, 5000.0]))
def test_the_published_test_lists_every_entry_above_its_thresholds(states: list[LayerState], ratio: float) -> None:
    expected = {
        (one.layer, dim, value)
        for one in states
        for dim, value in enumerate(one.hidden.tolist())
        if abs(value) > 100 and abs(value) > ratio * statistics.median(map(abs, one.hidden.tolist()))
    }
    found = sun(states, Thresholds(sun_ratio=ratio))
    assert set(found) == expected
    assert len(found) == len(expected)
