"""The most memory that is taken at once: by tensors beyond what is held before, on the GPUs, and by this process.

On a GPU the allocator counts what tensors take. Elsewhere nothing does, and every tensor that an operation returns is
counted while its storage lives; what a kernel takes for itself within one operation is not seen.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


def process_peak() -> int | None:
    """Bytes of memory that this process has been resident with at most; None where the system does not say.

    With Python, the libraries, and the files that are mapped into memory, such as a checkpoint's: the system takes the
    pages of those back where others need the memory.
    """
    if sys.platform == "win32":
        import psutil  # type: ignore[import-untyped] # its stubs are a package of their own

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # what getrusage gives there begins with the peak of the parent
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
        return None if found is None else 1024 * int(found[1])
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident() -> int:
    """Bytes of memory that this process is resident with now."""
    import psutil  # type: ignore[import-untyped] # its stubs are a package of their own

    return int(psutil.Process().memory_info().rss)


def gpu_peak() -> int | None:
    """Bytes that torch's allocator has held for tensors at most, on the GPU that held most; None without a GPU.

    Counted since `torch.cuda.reset_peak_memory_stats` was last called, which only `peak_of` does here.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return max(int(torch.cuda.max_memory_allocated(card)) for card in range(torch.cuda.device_count()))


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
    """Counts the bytes of the tensors that are made inside the block and still alive, and the most of them at once.

    fake: whether to count those without numbers, which take no memory, as well.
    """

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
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
            whole = func.namespace == "prim"  # what fake tensors are asked for, such as their device
            parts = NotImplemented if whole else func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        found = func(*args, **kwargs)
        for one in tree_iter(found):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or (storage.device.type == "meta" and not self.fake):
            return
        size = storage.nbytes()
        self._known[storage] = None
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, size: int) -> None:
        self.now -= size
