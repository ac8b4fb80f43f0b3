"""Rows an attack is compared with: as many drawn at random, and those of largest norm."""

from __future__ import annotations

import torch

from mwtool.architecture.packed import packed_dtype
from mwtool.models.load import Loaded
from mwtool.scan.targets import Target


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
