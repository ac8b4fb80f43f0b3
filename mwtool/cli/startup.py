"""What makes a short command end sooner: most of its time goes into importing torch and transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

IMPORTED = 100_000
"""New objects until the garbage collector looks at them; by default 700. Importing the libraries makes 400,000."""


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """Search for garbage cycles less often inside the block: imports make objects that stay, and few cycles.

    The collector's thresholds are as before when the block ends.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(IMPORTED, before[0]) if before[0] else 0, *before[1:])  # 0: switched off already
    try:
        yield
    finally:
        gc.set_threshold(*before)
