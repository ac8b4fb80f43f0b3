"""What makes a short command end sooner: most of its time goes into importing torch and transformers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

IMPORTED = 1_000_000
"""New objects until the garbage collector looks at them; by default 700. Importing the libraries makes 600,000."""


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """Search for garbage cycles less often inside the block: imports make objects that stay, and few cycles.

    When it ends, the thresholds are as before, and what was made inside counts as old: it is searched with the next
    full collection and not at once.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(IMPORTED, before[0]) if before[0] else 0, *before[1:])  # 0: switched off already
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # every object leaves its generation,
            gc.unfreeze()  # for the oldest one; neither looks at any
        gc.set_threshold(*before)


LOSSES, SCIPY = "transformers.loss.loss_utils", "scipy.optimize"
"""The losses of all of transformers' models, and the half second of imports that those for finding objects take."""


@contextmanager
def without_scipy() -> Iterator[None]:
    """Where transformers imports its losses inside the block, leave out scipy, of which they name one function.

    The losses then hold a function that imports scipy when it is called, and returns what scipy's returns. While they
    are imported, and only then, a module that loads scipy.optimize as soon as anything else is read from it stands in
    its place. Nothing is changed where scipy.optimize is imported already.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the losses where they are, to be imported by `_Loader`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == LOSSES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module's code with the stand-in for scipy.optimize, then hands the module to the loader it has."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        if SCIPY in sys.modules:
            self.own.exec_module(module)
            return
        stand_in = sys.modules[SCIPY] = _StandIn(SCIPY)
        try:
            self.own.exec_module(module)
        finally:
            if sys.modules.get(SCIPY) is stand_in:
                del sys.modules[SCIPY]


class _StandIn(ModuleType):
    """scipy.optimize, imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks every module for
            raise AttributeError(name)
        return getattr(self._real(), name)

    def linear_sum_assignment(self, *args: Any, **kwargs: Any) -> Any:
        """As scipy's own."""
        return self._real().linear_sum_assignment(*args, **kwargs)

    def _real(self) -> Any:
        if sys.modules.get(SCIPY) is self:
            del sys.modules[SCIPY]
        return import_module(SCIPY)
