"""Which rows an ablation takes, and which it takes beside them as controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mwtool.architecture.layout import FFN
from mwtool.architecture.packed import packed_dtype
from mwtool.architecture.validate import ffn_at
from mwtool.errors import BadValue
from mwtool.massive import MassiveWeights
from mwtool.models.load import Loaded
from mwtool.scan.capture import LayerState, Part
from mwtool.scan.loaded import massive_for, scan_loaded
from mwtool.scan.ranking import massive_count
from mwtool.scan.settings import Settings

RANKED = 16
"""Rows ranked at least, so that random controls avoid all truly massive ones whatever k is."""


@dataclass(frozen=True, slots=True)
class Target:
    """Ranked rows of one FFN.

    indices: by falling |z| of bos, or as given; what is attacked are the first k. All that are truly massive are
        among them, as far as they were ranked.
    count: how many of them are truly massive; None where that is not known.
    avoided: rows that are no random control either: truly massive ones that are not among `indices`.
    """

    layer: int
    ffn: FFN
    indices: tuple[int, ...]
    count: int | None = None
    avoided: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user chose; nothing: the massive rows.

    file: a saved scan. layer, expert, indices: rows of another place. each_layer: the top rows of every layer.
    """

    file: Path | None = None
    layer: int | None = None
    expert: int | None = None
    indices: tuple[int, ...] = ()
    each_layer: bool = False


def find_targets(
    loaded: Loaded, choice: Choice, k: int, settings: Settings | None = None
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The rows to attack, at least k of each FFN, and what the user should know about how they were found.

    Raises BadValue where there are no massive rows, or fewer than k, or no such layer, expert or row.
    """
    narrowest = min(ffn.width(loaded.base) for layer in loaded.layers for ffn in layer.ffns)
    settings = replace(settings or Settings(), k=max(k, min(RANKED, narrowest)))
    if choice.each_layer:
        scan = scan_loaded(loaded, replace(settings, all_layers=True))
        return tuple(_top(loaded, state, None, k) for state in scan.states), scan.notes
    if choice.layer is not None and not choice.indices:
        expert = _first_expert(loaded, choice.layer) if choice.expert is None else choice.expert
        ffn_at(loaded.layers, choice.layer, expert)  # refused before the scan
        scan = scan_loaded(loaded, replace(settings, all_layers=True))
        return (_top(loaded, scan.states[choice.layer], choice.expert, k),), scan.notes
    if choice.layer is not None:
        return (_given(loaded, choice, choice.layer, choice.expert, k),), ()
    massive, notes = massive_for(loaded, choice.file, settings)
    if massive is None:
        raise BadValue(
            f"{_subject(loaded, choice)} has no massive weights to attack; name rows yourself with "
            f"--layer N --indices I,J, or compare all layers with --each-layer"
        )
    expert = massive.expert if choice.expert is None else choice.expert
    if choice.indices:
        target = _given(loaded, choice, massive.layer, expert, k)
        same = expert == massive.expert
        return (replace(target, avoided=massive.indices[: massive.count] if same else ()),), notes
    if expert != massive.expert:
        raise BadValue(
            f"the massive rows are those of expert {massive.expert}; name rows of expert {expert} with --indices"
        )
    if k > len(massive.indices):
        raise BadValue(f"k is {k}; {choice.file} ranks {len(massive.indices)} rows: scan with -k {k}")
    if massive.count > len(massive.indices):
        notes = (*notes, _unranked(massive))
    return (Target(massive.layer, loaded.ffn(massive), massive.indices[: max(k, massive.count)], massive.count),), notes


def random_rows(target: Target, width: int, k: int, seed: int) -> tuple[int, ...] | None:
    """k rows that are not among the ranked ones, drawn with `seed`; None where there are not that many.

    The draws of one seed are nested: k = 3 takes the first three of what k = 5 takes.
    """
    ranked = {*target.indices, *target.avoided}
    others = [row for row in range(width) if row not in ranked]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(others[at] for at in order[:k]) if k <= len(others) else None


def norm_rows(loaded: Loaded, target: Target, k: int) -> tuple[int, ...] | None:
    """The k rows of largest Euclidean norm, up and gate taken together, massive ones included.

    None where the weights are packed or offloaded.
    """
    total = torch.zeros(())
    for place in target.ffn.inputs:
        matrix = place.read(loaded.base)  # (I, H)
        if matrix.is_meta or packed_dtype(loaded.base, place):
            return None
        total = total.to(matrix.device) + matrix.float().square().sum(1)
    return tuple(int(row) for row in total.argsort(descending=True, stable=True)[:k])


def _subject(loaded: Loaded, choice: Choice) -> str:
    if loaded.on == "merged" and choice.file is None:
        return f"{loaded.source.name} merged with {loaded.source.adapter}"
    return loaded.source.name


def _unranked(massive: MassiveWeights) -> str:
    return (
        f"{massive.count} rows are truly massive and {len(massive.indices)} are ranked: random controls may be among "
        f"the others"
    )


def _top(loaded: Loaded, state: LayerState, expert: int | None, k: int) -> Target:
    """The rows of largest |z| in a layer: of the expert asked for, else of the network that gives the most."""
    parts = [part for part in state.parts if expert is None or part.ffn.expert == expert]
    if not parts:
        routed = sorted(part.ffn.expert for part in state.parts if part.ffn.expert is not None)
        raise BadValue(
            f"bos is not routed to expert {expert} of layer {state.layer} but to {routed}; name its rows with --indices"
        )
    part = max(parts, key=lambda one: float(one.output.abs().max()))
    width = part.intermediate.numel()
    if k > width:
        raise BadValue(
            f"k is {k}; {part.ffn.module} in layer {state.layer} has {width} rows: k must be from 0 to {width}"
        )
    order = part.intermediate.abs().argsort(descending=True, stable=True).tolist()
    return Target(state.layer, part.ffn, tuple(order[: max(k, 1)]), avoided=tuple(order[: _carrying(loaded, part)]))


def _carrying(loaded: Loaded, part: Part) -> int:
    """How many rows are truly massive for the largest entry of the output; 0 where so many are that none stands out."""
    down = part.ffn.down.read(loaded.base)  # (H, I)
    if down.is_meta:
        return 0
    count = massive_count(part.intermediate, down[int(part.output.abs().argmax())])
    return count if count <= RANKED else 0


def _given(loaded: Loaded, choice: Choice, layer: int, expert: int | None, k: int) -> Target:
    ffn = ffn_at(loaded.layers, layer, expert)
    width = ffn.width(loaded.base)
    outside = [row for row in choice.indices if not 0 <= row < width]
    if outside:
        raise BadValue(f"row {outside[0]} does not exist; {ffn.module} in layer {layer} has rows 0 to {width - 1}")
    if k > len(choice.indices):
        raise BadValue(f"k is {k} and --indices names {len(choice.indices)} rows; name more, or lower -k")
    return Target(layer, ffn, choice.indices)


def _first_expert(loaded: Loaded, layer: int) -> int | None:
    ffns: Sequence[FFN] = loaded.layers[layer].ffns if 0 <= layer < len(loaded.layers) else ()
    return ffns[0].expert if ffns else None
