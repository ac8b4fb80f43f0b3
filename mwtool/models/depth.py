"""How many decoder layers a checkpoint can have, compared with what its configuration states."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint
from mwtool.models.checkpoint import open_checkpoint
from mwtool.models.weight_files import find_weights

if TYPE_CHECKING:
    from mwtool.models.source import Source

STATED = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call their number of decoder layers."""


def check_depth(source: Source, raw: dict[str, Any]) -> None:
    """Raise BadCheckpoint where config.json states more decoder layers than the checkpoint has names for.

    raw: config.json. Compared before anything is made of the number, which some configurations turn into a list: a
    layer's tensors have its index among the parts of their names, so that the largest number in any name bounds the
    layers there can be. No weights are read or fetched for it.
    """
    text = raw.get("text_config")
    parts = [raw, text] if isinstance(text, dict) else [raw]
    stated = {key: part[key] for part in parts for key in STATED if isinstance(part.get(key), int)}
    names = _names(source) if stated else ()
    if not names:
        return
    most = 1 + max((int(part) for name in names for part in name.split(".") if _counts(part)), default=len(names) - 1)
    for key, value in stated.items():
        if value > most:
            raise BadCheckpoint(
                f"{source.folder / 'config.json'} states {key} {value:,}; the tensors of {source.name} have names for "
                f"{most:,} layers at most: one of the two is another model's"
            )


def _counts(part: str) -> bool:
    """Whether a part of a tensor's name can be a layer's index."""
    return part.isdecimal() and part.isascii() and len(part) < 10  # noqa: PLR2004 - more digits are no count


def _names(source: Source) -> Collection[str]:
    """Names of the checkpoint's tensors as far as they are known; of a Hub's, those that an index gives away."""
    with suppress(BadCheckpoint):  # said when it is opened for its weights
        if source.repo is None:
            return open_checkpoint(source).files
        found = find_weights(source)
        return () if found is None or found.weight_map is None else found.weight_map
    return ()
