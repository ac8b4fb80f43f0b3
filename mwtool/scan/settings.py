"""Every setting of a scan, with its default. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mwtool.errors import BadValue
from mwtool.models.bos import PROMPT


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as massive.

    magnitude, ratio: an entry of h is massive above `magnitude` and above `ratio` times the median of |h|.
    sun_ratio: the ratio of the stricter published test (Sun et al. 2024), which is reported as well.
    spike: what input and output of ``down_proj`` must exceed at a super weight (Yu et al. 2024).
    """

    magnitude: float = 100.0
    ratio: float = 50.0
    sun_ratio: float = 1000.0
    spike: float = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHand:
    """What stands in place of the massive layer, or of its rows; nothing: what the definitions say.

    event: number of an event, from 0 in order of layers. layer: a decoder layer, with an event or without.
    expert: one of the routed experts that bos is sent to there. indices: rows, in the order they are to be listed.
    """

    event: int | None = None
    layer: int | None = None
    expert: int | None = None
    indices: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self != NOTHING

    def check(self, total: int, last: int) -> None:
        """Raise BadValue for what can be refused before the walk.

        total: decoder layers of the model; last: the layer where the walk ends.
        """
        if self.event is not None and self.layer is not None:
            raise BadValue("both an event and a layer are given; expected one of them, as an event has its layer")
        if self.layer is not None and not 0 <= self.layer < total:
            raise BadValue(f"layer {self.layer} does not exist; the model has layers 0 to {total - 1}")
        if self.layer is not None and self.layer > last:
            raise BadValue(f"layer {self.layer} is behind the end of the walk, layer {last}; raise --layers")
        twice = next((row for row in self.indices if self.indices.count(row) > 1), None)
        if twice is not None:
            raise BadValue(f"row {twice} is named twice; expected different rows")


NOTHING = ByHand()
"""Everything as the definitions have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What to run besides bos alone, each None for nothing.

    positions: a text, or a file with one, whose states are shown position by position; of its tokens the first `most`.
    attention: whether attention maps around the massive layer are kept for it.
    sinks: a file, or `demo` for the bundled text, on which the sink rate of every head is measured: at most
        `sink_windows` windows of `sink_length` tokens, with the threshold `eps` (Gu et al. 2024).
    triggers: a file, or `demo`, to search for tokens with a massive state: `windows` windows of `length` tokens.
    """

    positions: str | None = None
    most: int = 32
    attention: bool = False
    sinks: str | None = None
    sink_windows: int = 100
    sink_length: int = 64
    eps: float = 0.3
    triggers: str | None = None
    windows: int = 8
    length: int = 512

    def __post_init__(self) -> None:
        """Raises BadValue for attention maps without a text."""
        if self.attention and self.positions is None:
            raise BadValue("--attention keeps the attention maps of a text; give that with --positions")

    @property
    def any(self) -> bool:
        """Whether there is anything to run; how much of it decides nothing."""
        return (self.positions, self.sinks, self.triggers) != (None, None, None)


NO_TEXTS = Texts()
"""bos alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to scan.

    k: rows to rank, 1 to I. bos: as `--bos`; prompt: whose first token takes the place of bos under `never`.
    last_layer: where the walk ends; None for the model's last layer.
    by_hand: the event, layer, expert or rows to report as massive in place of those the definitions choose.
    texts: what to run after bos, for states by position, attention sinks and triggers.
    """

    k: int = 5
    bos: str = "auto"
    prompt: str = PROMPT
    thresholds: Thresholds = Thresholds()
    last_layer: int | None = None
    by_hand: ByHand = NOTHING
    texts: Texts = NO_TEXTS


Events = tuple[int, ...] | Literal["all", "up", "down"]
"""Events of a scan by their numbers, from 0; or all, or those that write up or down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the user chose; nothing: the massive rows.

    file: a saved scan. events, layers: their rows together. expert, indices: with one place, another expert or rows.
    each_layer: the top rows of every layer, one layer after the other.
    """

    file: Path | None = None
    events: Events = ()
    layers: tuple[int, ...] = ()
    expert: int | None = None
    indices: tuple[int, ...] = ()
    each_layer: bool = False

    def __post_init__(self) -> None:
        """Raises BadValue for choices that exclude each other."""
        places = [name for name in ("events", "layers", "each_layer") if getattr(self, name)]
        if len(places) > 1:
            raise BadValue(f"{' and '.join(map(_flag, places))} are given; expected one of them")
        if self.file is not None and (self.layers or self.each_layer):
            raise BadValue(f"--massive FILE names its layers; leave out {_flag(places[0])}")
        if self.each_layer and (self.indices or self.expert is not None):
            raise BadValue("--each-layer finds its own rows; leave out --indices and --expert")
        several = len(self.layers) > 1 or isinstance(self.events, str) or len(self.events) > 1
        if several and (self.indices or self.expert is not None):
            raise BadValue("--indices and --expert name rows of one layer; give one --layer or --event")
        if self.expert is not None and not (self.layers or self.events or self.indices):
            raise BadValue("--expert goes with --layer, --event or --indices")


def _flag(name: str) -> str:
    return f"--{name.removesuffix('s').replace('_', '-')}"
