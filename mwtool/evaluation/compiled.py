"""A model whose decoder layers are compiled while its perplexity is measured, and whether that paid for itself.

Each layer's forward is compiled, not that of the model: all layers of a kind share one graph, whose inputs are the
weights, so that it takes seconds to compile and sees rows that are edited in place. A layer runs uncompiled while hooks
act on its parts, as some attacks need them, and so do batches of other shapes than the first.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.errors import BadValue, MwtoolError
from mwtool.evaluation.batches import Batch
from mwtool.evaluation.chunked_loss import loss_of
from mwtool.interrupts import restored
from mwtool.models.compiler import FAULTS, compiler_failed, refuse_uncompilable

if TYPE_CHECKING:
    from mwtool.evaluation.measurement import Measured
    from mwtool.evaluation.tasks import Task

OPTION = "--compile"
GRAPHS = 64
"""Graphs kept of a layer's forward: one for each shape of batch and kind of layer, of every model that runs."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""By how much the mean -ln p of the first batch may differ from that of the uncompiled model, relative to it; in other
precisions by `EXACT`. A compiled layer keeps float32 where the uncompiled one rounds in between."""
EXACT = 1e-4
REPEATED = 2
"""How often the first batch is timed in each way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What compiling took and what it saves, measured on the first batch.

    windows: in that batch. seconds: spent on compiling. before, after: seconds a window, uncompiled and compiled.
    """

    windows: int
    seconds: float
    before: float
    after: float

    @property
    def pays(self) -> int | None:
        """The number of windows after which compiling has saved as much time as it took; None if it saves none."""
        return math.ceil(self.seconds / (self.before - self.after)) if self.after < self.before else None

    def document(self) -> dict[str, Any]:
        """As the document has it, under `setting.compile`."""
        return {
            "seconds": round(self.seconds, 3),
            "window_seconds": self.after,
            "window_seconds_uncompiled": self.before,
            "pays_after_windows": self.pays,
            "batch_windows": self.windows,
        }


def refuse_idle(tasks: Sequence[Task], *, compiled: bool) -> None:
    """Raise BadValue where the option would do nothing: no task is a perplexity."""
    if compiled and all(task.kind != "ppl" for task in tasks):
        raise BadValue(f"{OPTION} is for perplexities and no task is one; add one, such as ppl:FILE, or leave it out")


def compile_lines(measured: Iterable[Measured]) -> list[str]:
    """For people: of each task that was measured compiled, what compiling took and when it pays."""
    found = {one.task: one.setting["compile"] for one in measured if one.setting.get("compile")}
    return [f"{task}: {_line(speed)}" for task, speed in found.items()]


def _line(speed: dict[str, Any]) -> str:
    after, before, pays = speed["window_seconds"], speed["window_seconds_uncompiled"], speed["pays_after_windows"]
    each = f"{after:.3g} s a window compiled, {before:.3g} s uncompiled"
    until = "it does not pay for itself" if pays is None else f"it has paid for itself after {pays:,} windows"
    return f"compiled in {speed['seconds']:.3g} s; {each}: {until}"


class Compilation:
    """The compiled decoder layers of a model, used inside `at_work` for batches of one shape.

    model: the module whose parameters attacks change. layers: its decoder layers, in order. backend, mode: as
    torch.compile takes them. Raises UnsupportedModel for a model that is quantized or offloaded.
    """

    def __init__(
        self, model: Any, layers: Sequence[nn.Module], *, backend: str = "inductor", mode: str | None = None
    ) -> None:
        refuse_uncompilable(model, OPTION)
        self.speed: Speed | None = None
        self._shape: tuple[int, ...] | None = None
        self._switch = _Switch()
        options: dict[str, Any] = {"backend": backend, "dynamic": False, "mode": mode}
        self._layers = [_Layer(one, self._switch, options) for one in layers]
        self._loss: Any = torch.compile(loss_of, **options)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """As `loss_of`: -ln p of the targets, (N, V) and (N,) -> (N,)."""
        found: Tensor = (self._loss if self._switch.on else loss_of)(logits, targets)
        return found

    @restored
    def at_work(self) -> Iterator[None]:
        """Inside the block, the model's layers are those that can run compiled."""
        from torch import _dynamo

        before = [layer.module.__dict__.get("forward") for layer in self._layers]
        try:
            for layer in self._layers:
                layer.module.__dict__["forward"] = layer
            with _dynamo.config.patch(recompile_limit=GRAPHS):
                yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                layer.module.__dict__.pop("forward", None)
                if forward is not None:
                    layer.module.__dict__["forward"] = forward

    def run(self, batch: Batch, sums: Callable[[], Tensor]) -> Tensor:
        """What `sums` gives for a batch: the summed -ln p of each window, (B,).

        The first batch is run compiled and uncompiled, for its time and to compare the two. Raises MwtoolError where
        the compiler fails, or where the compiled model gives something else.
        """
        if self.speed is None:
            return self._tried(batch, sums)
        return self._compiled(sums) if tuple(batch.ids.shape) == self._shape else sums()

    def _compiled(self, sums: Callable[[], Tensor]) -> Tensor:
        """Raises MwtoolError where the compiler fails, which need not be the first time: layers differ in kind."""
        self._switch.on = True
        try:
            return sums()
        except torch.OutOfMemoryError:
            raise
        except FAULTS as fault:
            raise compiler_failed(OPTION, fault) from fault
        finally:
            self._switch.on = False

    def _tried(self, batch: Batch, sums: Callable[[], Tensor]) -> Tensor:
        sums()  # what libraries do once is no part of the time
        plain, before = _timed(sums, REPEATED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of the compiler on settings of torch
            _, first = _timed(lambda: self._compiled(sums))
        found, after = _timed(lambda: self._compiled(sums), REPEATED)
        many = len(batch.windows)
        _agree(plain.cpu(), found.cpu(), batch.scored.sum(1), self._layers[0].dtype)
        self._shape = tuple(batch.ids.shape)
        self.speed = Speed(windows=many, seconds=max(0.0, first - after), before=before / many, after=after / many)
        return found


@dataclass(slots=True)
class _Switch:
    """Whether the batch that runs now is one of those that run compiled. No circle of references keeps the model."""

    on: bool = False


class _Layer:
    """The forward of a decoder layer: compiled for some batches, unless hooks act on the layer's parts."""

    def __init__(self, module: nn.Module, switch: _Switch, options: dict[str, Any]) -> None:
        self.module, self.switch = module, switch
        self.plain: Callable[..., Any] = module.forward
        self.compiled: Callable[..., Any] = torch.compile(self.plain, **options)
        self.parts = [one for one in module.modules() if one is not module]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.switch.on and not any(one._forward_hooks or one._forward_pre_hooks for one in self.parts):  # noqa: SLF001
            return self.compiled(*args, **options)
        return self.plain(*args, **options)


def _timed(sums: Callable[[], Tensor], times: int = 1) -> tuple[Tensor, float]:
    """The result, and the seconds until the device has it: the fewest of so many times."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        found = sums()
        found.sum().item()
        took.append(time.perf_counter() - start)
    return found, min(took)


def _agree(plain: Tensor, compiled: Tensor, counts: Tensor, dtype: torch.dtype) -> None:
    """Raise MwtoolError where they differ by more than rounding.

    plain, compiled: summed -ln p of each window, (B,). counts: how many tokens that is of, (B,).
    """
    finite = plain.isfinite()
    before, after = (float(one[finite].sum() / counts[finite].sum()) for one in (plain, compiled))
    same = bool((finite == compiled.isfinite()).all())
    if same and not abs(after - before) > TOLERANCE.get(dtype, EXACT) * max(1.0, abs(before)):
        return
    raise MwtoolError(
        f"the compiled model gives {after:.4f} nats a token where the uncompiled one gives {before:.4f}: leave out "
        f"{OPTION}"
    )
