"""Weights that a scan of bos alone leaves out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.architecture.layout import DecoderLayer

if TYPE_CHECKING:
    from mwtool.models.streaming import Stream


@dataclass(frozen=True, slots=True)
class Unread:
    """A parameter by its name within a decoder layer, and the layers in which it was not read."""

    parameter: str
    layers: tuple[int, ...]


def unread(stream: Stream, walked: Sequence[DecoderLayer]) -> tuple[Unread, ...]:
    """What was left out of these layers, the model's first ones."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(walked):
        for name in (stream.left_out or {}).get(layer.path, {}):
            found[name.removeprefix(f"{layer.path}.")].append(index)
    return tuple(Unread(name, tuple(layers)) for name, layers in found.items())
