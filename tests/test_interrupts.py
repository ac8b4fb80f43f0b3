"""Ctrl-C at every point where a block begins, runs and ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from types import FrameType
from typing import Any

import pytest

from mwtool.interrupts import restored, uninterrupted

FILES = ("contextlib.py", "interrupts.py", "test_interrupts.py")
CHANGED: list[int] = []


def changing() -> Iterator[None]:
    CHANGED.append(1)
    try:
        yield
    finally:
        CHANGED.pop()


@restored
def outer() -> Iterator[None]:
    """Plain context managers inside of a restored one are safe with it."""
    with ExitStack() as stack:
        stack.enter_context(contextmanager(changing)())
        yield


def worked(block: Callable[[], AbstractContextManager[None]]) -> None:
    with block():
        pass
    for _ in range(200):  # here it comes at the latest
        time.sleep(0.001)


def pressed_at(event: int, run: Callable[[], None]) -> bool:
    """Press Ctrl-C at one of the events that a tracer sees of these files; whether there are so many."""
    seen = 0

    def traced(frame: FrameType, _kind: str, _argument: Any) -> Any:
        nonlocal seen
        # a signal cannot come between the last line of a block and its end, where a tracer can
        if frame.f_code.co_filename.endswith(FILES) and frame.f_code is not worked.__code__:
            seen += 1
            if seen == event:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert seen < event, "Ctrl-C was lost"
    return False


def left_behind(block: Callable[[], AbstractContextManager[None]]) -> list[int]:
    """The events at which Ctrl-C leaves the change in place, of all there are."""
    found = []
    for event in count(1):
        kept: list[BaseException] = []

        def run(kept: list[BaseException] = kept) -> None:
            try:
                worked(block)
            except KeyboardInterrupt as fault:
                kept.append(fault)  # with its traceback, as a notebook keeps it
                raise

        if not pressed_at(event, run):
            assert event > 20
            break
        if CHANGED:
            found.append(event)
        kept.clear()
        CHANGED.clear()
    return found


def test_a_restored_block_is_left_as_it_was_found_wherever_ctrl_c_comes() -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert left_behind(contextmanager(changing)) != []  # what this is for
    for block in (restored(changing), outer):
        assert left_behind(block) == []
        assert signal.getsignal(signal.SIGINT) is handler


def test_what_handled_ctrl_c_before_still_does_inside_of_a_block() -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with outer(), restored(changing)():
            signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, former)


def test_blocks_in_another_thread_change_no_handler() -> None:
    handlers: list[Any] = []

    def run() -> None:
        with outer():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
    assert CHANGED == []


def test_a_fault_inside_of_a_block_comes_through() -> None:
    with pytest.raises(ValueError, match="inside"), outer():
        raise ValueError("inside")
    assert CHANGED == []


def test_restoring_starts_over_until_it_finishes() -> None:
    calls: list[int] = []

    def restore() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(restore)
    assert len(calls) == 3
