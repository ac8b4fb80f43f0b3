"""States over the positions of a text, with bos at its start, in its middle, at its end, and without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mwtool.models.context import positions
from mwtool.scan.definitions import median
from mwtool.scan.given import text_or_file
from mwtool.scan.sequences import Taps, run
from mwtool.scan.sinks import importance
from mwtool.scan.texts import tokens_of, words_of

if TYPE_CHECKING:
    from mwtool.scan.settings import Settings
    from mwtool.scan.subject import Subject

Where = Literal["start", "middle", "end", "absent"]
TOP = 3
"""Entries kept of each position's state."""
BINS = 32
"""Parts that the dimensions of a state are divided into for pictures: of each its largest magnitude is kept."""


@dataclass(frozen=True, slots=True)
class PositionState:
    """One state at one position. top: its largest entries as (index, value). bins: largest magnitude of each part."""

    top: tuple[tuple[int, float], ...]
    median: float
    bins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Mean attention weights over the heads of one layer, (T, T): of each query, what it pays to each position."""

    layer: int
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The text with bos in one place.

    where, at: that place, and its position; None where bos is absent. tokens: as people read them.
    hidden, intermediate: by position, the residual stream after the shown layer and the input of its ``W_down``.
    before, after: attention received by each position (`importance`), the mean over heads and over the layers up to
        the shown one, whose attention comes before its FFN, and over those after it; None where no layer has any.
    maps: of the shown layer, the one before and the one after it, if they were asked for.
    """

    where: Where
    at: int | None
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    hidden: tuple[PositionState, ...]
    intermediate: tuple[PositionState, ...]
    before: tuple[float, ...] | None
    after: tuple[float, ...] | None
    maps: tuple[AttentionMap, ...] = ()


@dataclass(frozen=True, slots=True)
class Positions:
    """States by position. text: as given. layer: whose states they are. placements: those of bos."""

    text: str
    layer: int
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()


def states_by_position(subject: Subject, settings: Settings, layer: int) -> Positions:
    """Run the text of the settings once for each place of bos, all in one forward.

    layer: whose states are kept. Under ``--bos never`` the text runs alone. Raises BadValue for a text without tokens.
    """
    texts = settings.texts
    assert texts.positions is not None
    found = tokens_of(subject, text_or_file(texts.positions))
    room = positions(subject.model.config) or texts.most + 1  # one of them for bos
    ids = found[: min(texts.most, room - 1)]
    notes = (f"--positions: the first {len(ids)} of {len(found)} tokens are shown",) if len(ids) < len(found) else ()
    placed = _placed(ids, None if subject.bos.how == "none" else subject.bos.id)
    length = max(len(one) for _, _, one in placed)
    captured = _Captured(layer, [len(one) for _, _, one in placed], maps=texts.attention)
    # Causal: what follows the end of a shorter sequence does not change its states.
    batch = torch.tensor([one + one[-1:] * (length - len(one)) for _, _, one in placed])
    taps = Taps(
        hidden=captured.hidden,
        attention=captured.attention,
        intermediate=captured.intermediate,
        at=layer,
        last=settings.last_layer,
    )
    run(subject, batch, taps)
    placements = [captured.placement(n, where, at, one, words_of(subject, one))
                  for n, (where, at, one) in enumerate(placed)]  # fmt: skip
    return Positions(texts.positions, layer, tuple(placements), notes)


def _placed(ids: list[int], bos: int | None) -> list[tuple[Where, int | None, list[int]]]:
    if bos is None:
        return [("absent", None, ids)]
    middle = len(ids) // 2
    return [
        ("start", 0, [bos, *ids]),
        ("middle", middle, [*ids[:middle], bos, *ids[middle:]]),
        ("end", len(ids), [*ids, bos]),
        ("absent", None, ids),
    ]


class _Captured:
    """What is kept of the one forward over all placements. lengths: how many positions of each count."""

    def __init__(self, layer: int, lengths: list[int], *, maps: bool) -> None:
        self.layer, self.lengths, self.wants_maps = layer, lengths, maps
        self.states: dict[str, Tensor] = {}  # (B, T, width)
        self.received: dict[str, list[list[Tensor]]] = {"before": [], "after": []}  # by layer, by placement: (T,)
        self.maps: dict[int, Tensor] = {}  # (B, T, T)

    def hidden(self, layer: int, state: Tensor) -> None:
        if layer == self.layer:
            self.states["hidden"] = state.cpu()

    def intermediate(self, _layer: int, state: Tensor) -> None:
        self.states["intermediate"] = state.cpu()

    def attention(self, layer: int, weights: Tensor) -> None:
        parts = [
            importance(weights[n : n + 1, :, :length, :length])[0].mean(0).cpu()
            for n, length in enumerate(self.lengths)
        ]
        self.received["before" if layer <= self.layer else "after"].append(parts)
        if self.wants_maps and abs(layer - self.layer) <= 1:
            self.maps[layer] = weights.to(torch.float64).mean(1).cpu()

    def placement(self, n: int, where: Where, at: int | None, ids: list[int], tokens: list[str]) -> Placement:
        return Placement(
            where=where,
            at=at,
            ids=tuple(ids),
            tokens=tuple(tokens),
            hidden=tuple(self._states("hidden", n)),
            intermediate=tuple(self._states("intermediate", n)),
            before=self._mean("before", n),
            after=self._mean("after", n),
            maps=tuple(self._maps(n)),
        )

    def _states(self, name: str, n: int) -> Iterator[PositionState]:
        for vector in self.states[name][n, : self.lengths[n]].double():  # (width,)
            size = vector.abs()
            top = size.argsort(descending=True, stable=True)[:TOP].tolist()
            parts = [float(part.max()) for part in size.tensor_split(min(BINS, size.numel()))]
            yield PositionState(tuple((i, float(vector[i])) for i in top), median(vector), tuple(parts))

    def _mean(self, name: str, n: int) -> tuple[float, ...] | None:
        layers = [parts[n] for parts in self.received[name]]
        return tuple(torch.stack(layers).mean(0).tolist()) if layers else None

    def _maps(self, n: int) -> Iterator[AttentionMap]:
        length = self.lengths[n]
        for layer, weights in sorted(self.maps.items()):
            yield AttentionMap(layer, tuple(tuple(line) for line in weights[n, :length, :length].tolist()))
