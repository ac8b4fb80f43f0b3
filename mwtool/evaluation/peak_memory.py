"""The most memory that tensors take at once beyond what is held before: what a forward needs, as a trial shows it.

On a GPU the allocator counts it. Elsewhere nothing does, and every tensor that an operation returns is counted while
its storage lives; what a kernel takes for itself within one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


def peak_of(run: Callable[[], object], devices: set[torch.device]) -> int:
    """Bytes that tensors made by `run` take at most at once, over all devices together. devices: those it runs on."""
    cards = sorted({one.index or 0 for one in devices if one.type == "cuda"})
    before = {}
    for card in cards:
        torch.cuda.synchronize(card)
        torch.cuda.reset_peak_memory_stats(card)
        before[card] = torch.cuda.memory_allocated(card)
    live = LiveTensors()
    with nullcontext() if cards else live:
        run()
    return live.most if not cards else sum(torch.cuda.max_memory_allocated(card) - before[card] for card in cards)


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside the block and still alive, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, in the parts it consists of, so that what lies between them is counted too."""
        kwargs = kwargs or {}
        for one in tree_iter((args, kwargs)):
            if isinstance(one, Tensor):
                self._known.setdefault(one.untyped_storage(), None)  # was there before
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        found = func(*args, **kwargs)
        for one in tree_iter(found):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage.device.type == "meta":
            return
        size = storage.nbytes()
        self._known[storage] = None
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, size: int) -> None:
        self.now -= size
