"""The rows behind an event: which network of the layer wrote it, its rows by |z|, and how bos was routed to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.architecture.layout import DecoderLayer
from mwtool.errors import BadValue
from mwtool.massive import MassiveWeights
from mwtool.scan.capture import LayerState, Part
from mwtool.scan.definitions import Event, Write, median
from mwtool.scan.protect import Protected, to_protect

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mwtool.models.streaming import Stream

CARRIED = 0.9
"""`count` looks at the fewest top-ranked rows that make up this much of the output at d."""

NOTABLE = 0.1
"""Of those, rows at the end of the ranking with less than this part of the largest share are not counted."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One expert that bos is routed to.

    probability: the router's, over all experts; weight: what the expert's output is multiplied by;
    share: of what the layer's networks write to the massive dimension, signed.
    """

    expert: int
    probability: float
    weight: float
    share: float


@dataclass(frozen=True, slots=True)
class Router:
    """How bos is routed at the massive layer. shared_share: the shared expert's part; None if there is none."""

    layer: int
    choices: tuple[Choice, ...]
    shared_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranker:
    """Ranks the rows of networks whose states were captured.

    k: rows to rank; parameters: of the whole model, tied ones once; stream: where the weights come from disk.
    """

    model: nn.Module
    layers: Sequence[DecoderLayer]
    stream: Stream | None
    parameters: int
    k: int

    def event(self, state: LayerState, written: Sequence[Write]) -> Event:
        """The event of a layer: `written[0]`, with its rows. Where the layer has fewer than k rows, all are ranked."""
        main, part = written[0], carrier(state, written[0].dimension)
        return Event(
            **{name: getattr(main, name) for name in Write.__slots__},
            layer=state.layer,
            others=tuple(written[1:]),
            rows=self.rows(state, part, main, self.top(part)),
        )

    def top(self, part: Part, k: int | None = None) -> tuple[int, ...]:
        """The rows of the k largest |z|; equal ones keep their order."""
        order = part.intermediate.abs().argsort(descending=True, stable=True)
        return tuple(order[: self.k if k is None else k].tolist())

    def rows(self, state: LayerState, part: Part, write: Write, indices: Sequence[int]) -> MassiveWeights:
        """|z| of these rows, and how much each contributes to the output of ``down_proj`` at d."""
        z = part.intermediate  # (I,)
        row = self._down_row(state.layer, part, write.dimension)  # (I,)
        pieces = row.to(z.dtype) * z  # (I,): W_down[d, i] z_i
        whole = float(pieces.sum())
        entries = len(part.ffn.inputs) * len(indices) * part.output.numel()
        return MassiveWeights(
            layer=state.layer,
            module=part.ffn.module,
            expert=part.ffn.expert,
            indices=tuple(indices),
            magnitudes=tuple(abs(float(z[i])) for i in indices),
            shares=tuple(float(pieces[i]) / whole if whole else 0.0 for i in indices),
            median=median(z),
            count=massive_count(z, row),
            share_of_parameters=entries / self.parameters,
            dimension=write.dimension,
            value=write.after,
        )

    def protect(self, rows: MassiveWeights) -> tuple[Protected, ...]:
        """Where these rows are stored."""
        ffn = next(ffn for ffn in self.layers[rows.layer].ffns if ffn.expert == rows.expert)
        return to_protect(ffn, self.model, rows.indices, self.stream)

    def check(self, rows: MassiveWeights, part: Part) -> None:
        """Raise BadValue where k rows were asked for and the network has fewer."""
        whole = part.intermediate.numel()
        if self.k > whole:
            raise BadValue(
                f"k is {self.k}; {rows.module} in layer {rows.layer} has {whole} rows: k must be from 1 to {whole}"
            )

    def _down_row(self, layer: int, part: Part, dimension: int) -> Tensor:
        """``W_down[d]``, (I,), on the CPU; a streamed layer is read once more where the row was not kept."""
        if dimension in part.down_rows:
            return part.down_rows[dimension]
        whole = self.layers[layer]
        with nullcontext(part.ffn) if self.stream is None else self.stream.holding(whole, part.ffn) as held:
            return held.down.read(self.model)[dimension].to("cpu", copy=True)


def carrier(state: LayerState, dimension: int) -> Part:
    """The network that contributes most to what the layer writes to `dimension`; the only one if it is dense."""
    whole = sum(float(part.output[dimension]) for part in state.parts)
    return max(state.parts, key=lambda part: float(part.output[dimension]) * (1 if whole >= 0 else -1))


def routing(state: LayerState, dimension: int) -> Router | None:
    """How bos was routed in an MoE layer; None in a dense one."""
    whole = sum(float(part.output[dimension]) for part in state.parts)
    choices, shared = [], None
    for part in state.parts:
        share = float(part.output[dimension]) / whole if whole else 0.0
        if part.probability is None or part.weight is None or part.ffn.expert is None:
            shared = share
        else:
            choices.append(Choice(part.ffn.expert, part.probability, part.weight, share))
    return Router(state.layer, tuple(choices), shared) if choices else None


def massive_count(z: Tensor, row: Tensor) -> int:
    """How many top-ranked rows are truly massive for one output entry, ``W_down[d] @ z``.

    The fewest rows by |z| whose shares make up 90 % of it, without those at the end of the ranking whose own share is
    below a tenth of the largest: 89 % and then 0.2 % four times is one massive row, not five.

    z: (I,), float64; row: ``W_down[d]``, (I,).
    """
    pieces = (row.to("cpu", z.dtype) * z)[z.abs().argsort(descending=True, stable=True)]
    whole = float(pieces.sum())
    if not whole:
        return 0
    shares = pieces / whole
    reached = (shares.cumsum(0) >= CARRIED).nonzero()[:, 0].tolist()
    top = shares[: reached[0] + 1] if reached else shares
    return int((top >= NOTABLE * top.max()).nonzero()[-1, 0]) + 1
