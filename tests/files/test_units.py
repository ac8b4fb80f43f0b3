"""Bytes and durations in words."""

from __future__ import annotations

import pytest

from mwtool.files.units import duration, size


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0.0 kB"),
        (7_680, "7.7 kB"),
        (1e5, "0.1 MB"),
        (1_240_000, "1.2 MB"),
        (99_900_000, "99.9 MB"),
        (1e8, "0.10 GB"),
        (1.6e13, "16,000.00 GB"),
    ],
)
def test_bytes_are_in_the_largest_unit_of_which_there_is_a_tenth(count: float, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "0.012 s"), (5.04, "5.04 s"), (119, "119 s"), (150, "2.5 minutes"), (7199, "120 minutes"),
     (9000, "2.5 hours")],
)  # fmt: skip
def test_durations_are_in_the_largest_unit_of_which_there_are_two(seconds: float, words: str) -> None:
    assert duration(seconds) == words
