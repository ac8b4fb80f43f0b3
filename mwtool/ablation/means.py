"""Mean intermediate states for the mode `mean`, and the edits that take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mwtool.architecture.layout import FFN
from mwtool.errors import BadValue
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.interrupts import restored
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Edit
from mwtool.surgery.hooks import averaging

if TYPE_CHECKING:
    from mwtool.ablation.sweep import Sweep

Means = dict[tuple[int, int | None], Tensor]
"""The mean intermediate state, (I,), of the network of a layer and expert; empty where no mode needs it."""


def edits_of(targets: Group, rows: Sequence[tuple[int, ...]], means: Means) -> list[Edit]:
    """These rows of each place, with their means where there are any."""
    return [
        Edit(target.ffn, some, means.get((target.layer, target.ffn.expert)))
        for target, some in zip(targets, rows, strict=True)
    ]


def means_for(loaded: Loaded, groups: Sequence[Group], sweep: Sweep, tasks: Sequence[Prepared]) -> Means:
    """Mean intermediate states, (I,), over the windows of all perplexity tasks; none unless a mode needs them.

    Raises BadValue if there is no perplexity task.
    """
    windows = _windows_for(sweep, tasks)
    if not windows:
        return {}
    return {
        (target.layer, target.ffn.expert): mean_state(
            loaded.model, loaded.base, target.ffn, loaded.layers[target.layer].path, windows
        )
        for target in dict.fromkeys(target for group in groups for target in group)
    }


def untaken_means(loaded: Loaded, groups: Sequence[Group], sweep: Sweep, tasks: Sequence[Prepared]) -> Means:
    """Zeros in the place of what `means_for` gives, for a trial of what attacks take. Raises BadValue likewise."""
    if not _windows_for(sweep, tasks):
        return {}
    return {
        (target.layer, target.ffn.expert): torch.zeros(target.ffn.width(loaded.base), dtype=torch.float64)
        for group in groups
        for target in group
    }


def _windows_for(sweep: Sweep, tasks: Sequence[Prepared]) -> list[Tensor]:
    """Those over which means are taken; none where no mode needs any."""
    if all(mode.mode != "mean" for mode in sweep.modes):
        return []
    windows = [ids for one in tasks if isinstance(one, PerplexityTask) for ids in one.windows.ids]
    if not windows:
        raise BadValue("mean needs windows to take the rows' mean values over; add a perplexity task, such as ppl:FILE")
    return windows


def mean_state(model: Any, base: Any, ffn: FFN, layer: str, windows: Iterable[Tensor]) -> Tensor:
    """The mean intermediate state over all tokens of the windows, (I,), float64; each forward ends at the layer.

    A routed expert's is over the tokens it receives. Raises BadValue where it receives none.
    """
    windows = list(windows)
    check_vocabulary(model, windows)
    device = model.get_input_embeddings().weight.device
    with _ending_at(base.get_submodule(layer)), averaging(base, ffn) as average, torch.inference_mode():
        for ids in windows:
            with suppress(_Stop):
                model(input_ids=ids[None].to(device), use_cache=False)
    if average.values is None and ffn.expert is None:
        raise BadValue("mean needs windows=, token ids over which to take the rows' mean values; none were given")
    if average.values is None:
        raise BadValue(f"{ffn.module}: no token of the text is routed to expert {ffn.expert}, so there is no mean")
    return average.values.clone()


@restored
def _ending_at(layer: nn.Module) -> Iterator[None]:
    """Every forward inside the block ends at the layer."""

    def stop(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _Stop

    handle = layer.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


class _Stop(Exception):
    """Ends a forward after the requested layer."""
