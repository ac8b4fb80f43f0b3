"""Fetch tensors of the Hub over several connections, and those of the next layer while one is computed.

Everything goes to the cache on the disk: never are the tensors of two layers in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any

from mwtool.errors import MwtoolError
from mwtool.models import remote_tensors
from mwtool.models.key_mapping import Rows
from mwtool.models.remote_tensors import Piece

CONNECTIONS = 8
"""Ranges that are fetched at a time."""
PATIENCE = 0.5
"""Seconds between looks at Ctrl-C while others fetch."""

Progress = Callable[[int, int], None]
"""Called with the bytes of weights that have been read or fetched, and with about how many a walk takes in all."""


class _Stopped(Exception):
    """Nobody waits for this any more."""


@dataclass(slots=True, kw_only=True)
class Meter:
    """How far a walk is. layers: how many it takes. report: called as more is done.

    What is still to come is taken to be as large as what was begun: headers of later files are not fetched for it.
    """

    layers: int
    report: Progress
    done: int = 0
    begun: int = 0
    announced: int = 0
    _changing: Lock = field(default_factory=Lock)

    def begin(self, size: int, *, layer: bool = True) -> None:
        """A layer of so many bytes, or a part of one that was not known before, such as an expert."""
        with self._changing:
            self.announced += size
            self.begun += layer

    def add(self, size: int) -> None:
        """So many bytes are there."""
        with self._changing:
            self.done += size
            total = self.announced * max(self.layers, self.begun) // max(self.begun, 1)
            self.report(self.done, max(total, self.done))


@dataclass(slots=True, kw_only=True)
class Fetcher:
    """Threads that fetch pieces in the order in which they were asked for. They end with the process, or at `stop`.

    on_bytes: called, from any thread, with the bytes that have arrived.
    """

    on_bytes: Callable[[int], None] = lambda _size: None
    _queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = field(default_factory=SimpleQueue)
    _threads: list[Thread] = field(default_factory=list)
    _begun: dict[Path, Future[None]] = field(default_factory=dict)
    _stopped: bool = False

    def begin(self, pieces: Iterable[Piece]) -> None:
        """Have these fetched, without waiting for them; those that were asked for already are not again."""
        for piece in pieces:
            if piece.path not in self._begun:
                self._begun[piece.path] = self.submit(lambda piece=piece: piece.fetch(self._count))  # type: ignore[misc] # mypy infers no default

    def fetch(self, pieces: Sequence[Piece]) -> None:
        """Have these fetched, and wait. Raises what `read_range` raises."""
        self.begin(pieces)
        self.wait([self._begun[path] for path in dict.fromkeys(piece.path for piece in pieces)])
        for piece in pieces:
            self._begun.pop(piece.path, None)

    def wait(self, futures: Sequence[Future[None]]) -> None:
        """Wait for these; raises the error of the first that failed. Ctrl-C is noticed in the meantime."""
        left: set[Future[None]] = set(futures)
        while left:
            done, left = wait(left, timeout=PATIENCE, return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Have a thread do this; errors other than MwtoolError are its own."""
        if not self._threads:
            from huggingface_hub.utils import get_session

            get_session()  # here, since huggingface_hub 1.5 would make one in each thread and lose all but the last
            self._threads += [Thread(target=self._work, daemon=True) for _ in range(CONNECTIONS)]
            for thread in self._threads:
                thread.start()
        future: Future[None] = Future()
        self._queue.put((task, future))
        return future

    def stop(self) -> None:
        """Have the threads end; what has arrived by then stays. One whose server is silent is left behind."""
        self._stopped = True
        for _ in self._threads:
            self._queue.put(None)
        until = monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))

    def _count(self, size: int) -> None:
        if self._stopped:
            raise _Stopped
        self.on_bytes(size)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            task, future = job
            if self._stopped:
                continue
            try:
                task()
            except MwtoolError as fault:
                future.set_exception(fault)
            except _Stopped:
                return
            else:
                future.set_result(None)
            finally:
                if not future.done():
                    future.set_exception(RuntimeError("a thread that fetches has ended"))


def small_enough(pieces: Iterable[Piece]) -> bool:
    """Whether these can be fetched ahead without pushing out of the cache what is needed before them."""
    return sum(piece.size for piece in pieces) <= remote_tensors.LIMIT // 4


def stored_bytes(tensor: Any, rows: Sequence[int] | None = None) -> int:
    """Bytes of a lazy tensor, or of these entries along its first dimension, as they are stored."""
    if isinstance(tensor, Rows):
        return stored_bytes(tensor.tensor, tensor.rows)
    if hasattr(tensor, "parts"):  # dequantized, and read whole, all it is stored in
        return sum(stored_bytes(part) for part in tensor.parts.values())
    if not hasattr(tensor, "get_shape"):  # of a `.bin` file
        return int(tensor.nbytes)
    shape = list(tensor.get_shape())
    bits = re.search("[0-9]+", tensor.get_dtype())  # BF16, F8_E4M3, I32; a BOOL has a byte
    count = prod(shape if rows is None else [len(rows), *shape[1:]])
    return count * (8 if bits is None else int(bits[0])) // 8


def quietly(task: Callable[[], None]) -> Callable[[], None]:
    """A task whose errors are left to whoever does the same and needs it."""

    def done() -> None:
        with suppress(MwtoolError):
            task()

    return done
