"""What a scan puts off or leaves out so that it ends sooner, and that nothing of it stays."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from command import run

from mwtool.cli.startup import IMPORTED, SCIPY, _StandIn, rarely_collecting
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


def test_what_was_made_meanwhile_is_not_searched_at_once_and_is_collected_later() -> None:
    gc.unfreeze()  # as it is where a command begins
    gc.collect()
    found: list[int] = []
    with rarely_collecting():
        cycles = [[] for _ in range(10_000)]  # type: list[list[Any]]
        for cycle in cycles:
            cycle.append(cycle)
        young = gc.get_count()[0]
    assert gc.get_count()[0] < 1_000 < young
    gc.callbacks.append(callback := lambda phase, info: found.append(info["collected"]) if phase == "stop" else None)
    try:
        del cycles, cycle
        gc.collect()
    finally:
        gc.callbacks.remove(callback)
        gc.freeze()
    assert found[-1] >= 10_000


def test_thresholds_that_are_higher_already_or_off_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *values: set_to.append(values))
    for before in ((IMPORTED + 1, 10, 10), (0, 10, 10)):
        monkeypatch.setattr(gc, "get_threshold", lambda before=before: before)
        with rarely_collecting():
            pass
        assert set_to.pop() == set_to.pop() == before


def apart(code: str) -> Any:
    """What a process of its own prints, as Python."""
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return ast.literal_eval(ran.stdout)


def test_a_scan_imports_no_scipy_and_whoever_imports_it_afterwards_gets_scipy() -> None:
    pytest.importorskip("scipy")
    found = apart("""
        import contextlib, io, sys
        from mwtool.cli import app
        with contextlib.redirect_stdout(io.StringIO()):
            app(["scan", "demo", "--json"], standalone_mode=False)
        during = [name for name in sys.modules if name.partition(".")[0] == "scipy"]
        finders = [type(one).__module__ for one in sys.meta_path]
        from transformers.loss import loss_for_object_detection, loss_utils
        rows, columns = loss_for_object_detection.linear_sum_assignment([[4, 1], [2, 8]], maximize=True)
        import scipy.optimize
        from scipy.optimize import linear_sum_assignment
        print([
            during,
            "mwtool.cli.startup" in finders,
            columns.tolist(),
            scipy.optimize.__spec__.origin.endswith("__init__.py"),
            sys.modules["scipy.optimize"] is scipy.optimize,
            linear_sum_assignment.__module__.startswith("scipy.optimize"),
            type(loss_utils.__loader__).__name__ == type(loss_utils.__spec__.loader).__name__ == "SourceFileLoader",
        ])
    """)
    assert found == [[], False, [0, 1], True, True, True, True]


def test_what_else_is_read_from_scipy_while_the_losses_are_imported_is_scipys_own() -> None:
    scipy = pytest.importorskip("scipy")
    assert scipy
    stand_in = _StandIn(SCIPY)
    from scipy import optimize

    assert stand_in.minimize is optimize.minimize
    assert sys.modules[SCIPY] is optimize
    assert not hasattr(stand_in, "nothing_of_scipy")
    assert not hasattr(stand_in, "__path__")


def test_scipy_that_is_imported_already_is_what_the_losses_hold() -> None:
    pytest.importorskip("scipy")
    assert apart("""
        from scipy.optimize import linear_sum_assignment
        from mwtool.cli.startup import without_scipy
        with without_scipy():
            from transformers.loss import loss_utils
        from transformers.loss import loss_for_object_detection
        print(loss_for_object_detection.linear_sum_assignment is linear_sum_assignment)
    """)
