"""What a scan puts off or leaves out so that it ends sooner, and that nothing of it stays."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from command import run

from mwtool.cli.startup import IMPORTED, rarely_collecting
from mwtool.errors import ModelNotFound
from mwtool.scan import scanner


def test_a_scan_collects_garbage_rarely_and_the_thresholds_are_as_before_even_if_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, before = [], gc.get_threshold()

    def failing(*_args: Any, **_settings: Any) -> None:
        seen.append(gc.get_threshold())
        raise ModelNotFound("no such folder: x")

    monkeypatch.setattr(scanner, "scan_checkpoint", failing)
    assert run("scan", "x").code == 1
    assert seen == [(IMPORTED, *before[1:])]
    assert gc.get_threshold() == before


def test_thresholds_that_are_higher_already_or_off_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *values: set_to.append(values))
    for before in ((IMPORTED + 1, 10, 10), (0, 10, 10)):
        monkeypatch.setattr(gc, "get_threshold", lambda before=before: before)
        with rarely_collecting():
            pass
        assert set_to.pop() == set_to.pop() == before
