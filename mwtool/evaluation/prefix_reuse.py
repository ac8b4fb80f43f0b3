"""Perplexity of a model and of many attacks on it, each attack running only the layers it can change.

The residual stream that enters decoder layer l does not depend on the rows of layer l. For each batch of windows the
unattacked model runs once, and what its layers return is kept. Under an attack on layer l the layers below l then
return what they returned before instead of computing it again, and the model's own forward does the rest, so the
logits are those of a whole forward, bit for bit. Whether that holds is tried on a few tokens first; a model that
passes more between its layers than they return (key-value states shared among layers, for one) runs whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.evaluation.batches import Batch, Halving, batches, windows_at_once
from mwtool.evaluation.chunked_loss import TESTED
from mwtool.evaluation.perplexity import (
    Perplexity,
    batch_sums,
    check_vocabulary,
    head_for,
    notes_on,
    per_sample,
    summarize,
)
from mwtool.evaluation.windows import Windows
from mwtool.interrupts import restored

if TYPE_CHECKING:
    from mwtool.evaluation.compiled import Compilation

LACKING = (AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""Exceptions of model code if a layer did not run on which a later one depends."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A change of the model to measure under.

    layer: the lowest decoder layer that is changed. apply: the context in which the change is in force; entered once
    for each batch of windows.
    """

    layer: int
    apply: Callable[[], AbstractContextManager[None]]


def perplexities(
    model: Any,
    layers: Sequence[nn.Module],
    windows: Windows,
    variants: Sequence[Variant],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    earlier: Sequence[Sequence[float]] = (),
    on_part: Callable[[Sequence[Sequence[float]]], None] | None = None,
    compiled: Compilation | None = None,
) -> list[Perplexity]:
    """Perplexity in the current state, then under each variant, bit for bit that of `perplexity` for each.

    model: what to call. layers: its decoder layers, in order.
    batch_size, compiled: as `perplexity` takes them. The layers' outputs for one batch are kept.
    on_batch: called with what is done and how much there is, in forwards. on_part: called after each batch with the
    summed -ln p of each window so far, of the current state and under each variant. earlier: such sums, to continue
    from; they are left out where they do not end with a batch. Raises what `perplexity` does, and whatever a variant
    raises.
    """
    check_vocabulary(model, windows.ids)
    device = model.get_input_embeddings().weight.device
    size = batch_size or windows_at_once(model, windows)
    wanted = {variant.layer for variant in variants} - {0}
    states = 1 + len(variants)
    seconds, sums, halving = [0.0] * states, [list[float]() for _ in range(states)], Halving()
    with torch.inference_mode(), nullcontext() if compiled is None else compiled.at_work():
        few = windows.ids[0][None, :TESTED].to(device)
        head, reusable = head_for(model, few, compiled), not wanted or is_reusable(model, layers, few, wanted)
        parts = list(batches(windows, size))
        done = batches_done(parts, earlier, states)
        if done:
            sums = [list(one) for one in earlier]
        for index, batch in list(enumerate(parts))[done:]:

            def in_all_states(part: Batch, before: int = index * states) -> list[Tensor]:
                recording, found = Recording(layers, wanted if reusable else set()), list[Tensor]()
                for at in range(states):
                    start = time.perf_counter()
                    change = nullcontext() if at == 0 else variants[at - 1].apply()
                    with change, recording.capturing() if at == 0 else recording.replayed(variants[at - 1].layer):
                        found.append(batch_sums(head, part, windows.length, device, compiled).cpu())
                    seconds[at] += time.perf_counter() - start
                    if on_batch is not None:
                        on_batch(before + at + 1, len(parts) * states)
                return found

            for at, found in enumerate(halving.run(batch, in_all_states)):
                sums[at] += found.tolist()
            if on_part is not None:
                on_part(sums)
    notes = (*notes_on(head), *halving.notes)
    if not reusable:
        notes += (f"{type(head.inner).__name__} passes more between its layers than they return: attacks run it whole",)
    return [
        summarize(per_sample(windows, parts, found), windows.units, spent, notes)
        for found, spent in zip(sums, seconds, strict=True)
    ]


def batches_done(parts: Sequence[Batch], sums: Sequence[Sequence[float]], states: int) -> int:
    """How many batches these sums of each window are of; 0 where they are not of whole batches in all states."""
    ends = list(accumulate((len(batch.windows) for batch in parts), initial=0))
    counts = {len(one) for one in sums}
    return ends.index(counts.pop()) if len(sums) == states and len(counts) == 1 and counts <= {*ends} else 0


class Recording:
    """The recorded outputs of decoder layers in one forward, and a way to replay them.

    wanted: layers l of which the stream that enters them is kept, (B, T, H) each; of all others only the form of what
    the layer returns.
    """

    def __init__(self, layers: Sequence[nn.Module], wanted: set[int]) -> None:
        self.layers, self.wanted = layers, wanted
        self.forms: dict[int, Any] = {}
        self.streams: dict[int, Tensor] = {}

    @restored
    def capturing(self) -> Iterator[None]:
        """Record the last forward inside the block."""
        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers[: max(self.wanted, default=0)]):
                hooks.callback(layer.register_forward_hook(self._keep(index)).remove)
            yield

    @restored
    def replayed(self, layer: int) -> Iterator[None]:
        """Inside the block, the layers below `layer` return the recorded outputs without computing anything."""
        below = list(enumerate(self.layers[:layer])) if layer in self.streams else []
        before = [module.__dict__.get("forward") for _, module in below]  # accelerate puts one there
        try:
            for index, module in below:
                module.__dict__["forward"] = _returning(_with_stream(self.forms[index], self.streams[layer]))
            yield
        finally:
            for (_, module), forward in zip(below, before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _keep(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if index + 1 in self.wanted:
                self.streams[index + 1] = output if isinstance(output, Tensor) else output[0]
            self.forms[index] = _with_stream(output, None)

        return hook


def is_reusable(model: Any, layers: Sequence[nn.Module], ids: Tensor, wanted: set[int]) -> bool:
    """Whether replaying the layers below each of `wanted` gives the logits of a whole forward, bit for bit.

    ids: (1, T), a few tokens to try it on.
    """
    recording = Recording(layers, wanted)
    with torch.inference_mode():
        with recording.capturing():
            whole: Tensor = model(input_ids=ids, use_cache=False).logits
        for layer in sorted(wanted):
            try:
                with recording.replayed(layer):
                    again: Tensor = model(input_ids=ids, use_cache=False).logits
            except LACKING:
                return False
            if layer not in recording.streams or not torch.equal(again.nan_to_num(), whole.nan_to_num()):
                return False
    return True


def _with_stream(output: Any, stream: Tensor | None) -> Any:
    """The layer's output with another residual stream in it: some layers return the stream, some a tuple of it."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_options: output
