"""What a forward over decoder layers is supplied with: their tensors, fetched from the Hub if need be, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mwtool.models.checkpoint import Checkpoint
from mwtool.models.fetching import Fetcher, Meter, Progress, quietly, small_enough, stored_bytes
from mwtool.models.key_mapping import pieces


@dataclass(slots=True, kw_only=True)
class Supply:
    """Of one forward. tensors_of: path of a decoder layer -> the checkpoint names that are read for it.

    after: path of a layer -> that of the next one in the forward. meter: None where nobody asks how far it is.
    """

    checkpoint: Checkpoint
    tensors_of: Callable[[str], list[str]]
    after: dict[str, str]
    meter: Meter | None
    fetcher: Fetcher
    _ahead: dict[str, Future[None]] = field(default_factory=dict)

    def have(self, tensors: Sequence[Any], layer: str | None = None) -> None:
        """Have lazy tensors on this machine, and begin to fetch those of the layer after this one.

        layer: the path of the layer that they are all of; None for others, such as experts that were chosen.
        Raises what `read_range` raises, here, where it can be interrupted and is not an error of a conversion.
        """
        size = 0 if self.meter is None else sum(map(stored_bytes, tensors))
        if self.meter is not None:
            self.meter.begin(size, layer=layer is not None)
        if layer in self._ahead:
            self.fetcher.wait([self._ahead.pop(layer)])
        wanted = [piece for tensor in tensors for piece in pieces(tensor)]
        if wanted:
            self.fetcher.begin(wanted)
            if layer in self.after:
                self._fetch_ahead(self.after[layer])
            self.fetcher.fetch(wanted)
        elif self.meter is not None:
            self.meter.add(size)

    def _fetch_ahead(self, path: str) -> None:
        """Have a layer fetched while the one before it is read and computed. Its experts are not known yet."""
        names = self.tensors_of(path)

        def begin() -> None:
            with self.checkpoint.tensors(names) as tensors:
                found = [piece for name in names for piece in pieces(tensors[name])]
            if small_enough(found):
                self.fetcher.begin(found)

        self._ahead[path] = self.fetcher.submit(quietly(begin))


def supply(
    checkpoint: Checkpoint, paths: Sequence[str], tensors_of: Callable[[str], list[str]], on_progress: Progress | None
) -> Supply:
    """For a forward over the layers of these paths."""
    meter = None if on_progress is None else Meter(layers=len(paths), report=on_progress)
    fetcher = Fetcher() if meter is None else Fetcher(on_bytes=meter.add)
    return Supply(
        checkpoint=checkpoint, tensors_of=tensors_of, after=dict(pairwise(paths)), meter=meter, fetcher=fetcher
    )


def have_alone(tensors: Sequence[Any]) -> None:
    """Have lazy tensors on this machine, outside a forward, one after the other."""
    for tensor in tensors:
        for piece in pieces(tensor):
            piece.fetch(lambda _size: None)
