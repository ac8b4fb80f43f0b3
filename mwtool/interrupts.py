"""Leave a model as it was even if Ctrl-C is pressed at any moment, once or several times."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

AGAIN = 0.001
"""Seconds after which Ctrl-C is tried again that came while a model was being changed or restored."""
ENTERING = {"__enter__", "__exit__", "enter_context", "callback", "push", "_push_cm_exit", "_push_exit_callback"}
"""Functions of contextlib between which and the block, or the end of a block, an exception would be lost."""
NEAR = 4
"""How many of the innermost calls may be those functions."""


def uninterrupted(restore: Callable[[], None]) -> None:
    """Call `restore` until it finishes: Ctrl-C in the meantime starts it over.

    Raises KeyboardInterrupt after it has finished, if Ctrl-C was pressed.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as again:
            interrupted = again
    if interrupted is not None:
        raise interrupted


def restored(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As contextlib.contextmanager; Ctrl-C comes before, inside or after the block, never while it begins or ends.

    A context manager that Ctrl-C meets there is entered and never left, or left without what its `finally` does, until
    the traceback is forgotten, which a notebook keeps. Signals reach the main thread alone; elsewhere nothing differs.
    """
    made = contextmanager(function)

    @wraps(function)
    def managed(*args: P.args, **options: P.kwargs) -> AbstractContextManager[T]:
        return _Restored(made(*args, **options))

    return managed


class _Restored(AbstractContextManager[T], Generic[T]):
    listening = False

    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self.inner = inner

    def __enter__(self) -> T:
        self.listening, entered = _listen(), False
        try:
            found = self.inner.__enter__()
            entered = True
            return found
        finally:
            if not entered:
                self._end()

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self.inner.__exit__(kind, fault, trace)
        finally:
            self._end()

    def _end(self) -> None:
        if self.listening:
            self.listening = False
            _end_listening()


class _Blocks:
    """The blocks that the main thread is in, and what handled Ctrl-C before the outermost of them.

    pending: whether Ctrl-C came while one began or ended, and is still to be answered.
    """

    depth = 0
    former: Any = None
    pending = False


def _listen() -> bool:
    """Handle Ctrl-C from here on; whether that is to be ended."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if _Blocks.depth == 0:
        former = signal.getsignal(signal.SIGINT)
        if not callable(former):  # ignored, or it ends the process
            return False
        _Blocks.former = former
        signal.signal(signal.SIGINT, partial(_pressed, former))
    _Blocks.depth += 1
    return True


def _end_listening() -> None:
    _Blocks.depth -= 1
    if _Blocks.depth == 0:
        signal.signal(signal.SIGINT, _Blocks.former)
        if _Blocks.pending:
            _Blocks.pending = False
            signal.raise_signal(signal.SIGINT)


def _pressed(former: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
    if _is_changing(frame):
        _Blocks.pending = True
        retry = threading.Timer(AGAIN, _press_again)
        retry.daemon = True
        retry.start()
    else:
        former(number, frame)


def _press_again() -> None:
    if _Blocks.pending:
        _Blocks.pending = False
        _thread.interrupt_main()


def _is_changing(frame: FrameType | None) -> bool:
    """Whether a block is beginning or ending: the calls that do are in progress."""
    at = 0
    while frame is not None:
        code = frame.f_code
        if code in _CHANGING or (at < NEAR and code.co_filename == contextlib.__file__ and code.co_name in ENTERING):
            return True
        frame, at = frame.f_back, at + 1
    return False


_CHANGING = {_Restored.__enter__.__code__, _Restored.__exit__.__code__}
