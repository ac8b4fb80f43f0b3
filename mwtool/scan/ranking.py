"""The rows of the massive layer: the network that carries the massive dimension, its rows by |z|, where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.architecture.layout import FFN
from mwtool.massive import MassiveWeights
from mwtool.scan.capture import LayerState, Part
from mwtool.scan.definitions import Origin, median

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mwtool.models.streaming import Stream

SHARE = 0.9
"""Truly massive are the fewest top-ranked rows that make up this much of the output at d."""


@dataclass(frozen=True, slots=True)
class Protected:
    """Entries of one parameter that belong to the massive rows: keep them in high precision when quantizing.

    expert: entry along the parameter's first dimension, where it holds all experts.
    """

    parameter: str
    checkpoint_name: str | None
    dim: int
    indices: tuple[int, ...]
    expert: int | None = None


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


def carrier(state: LayerState, dimension: int) -> Part:
    """The network of a layer that writes most of the massive dimension; the only one if the layer is dense."""
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


def rank(
    part: Part, held: FFN, model: nn.Module, origin: Origin, *, layer: int, k: int, parameters: int
) -> MassiveWeights:
    """The rows by |z|, and how much each contributes to ``down_proj`` at d.

    held: where the network's weights can be read now; the same as `part.ffn` unless it is streamed.
    """
    z = part.intermediate  # (I,)
    order = z.abs().argsort(descending=True, stable=True)
    row = held.down.read(model)[origin.dimension]
    pieces = row.to("cpu", z.dtype) * z  # (I,): W_down[d, i] z_i
    whole = float(pieces.sum())
    indices = tuple(int(i) for i in order[:k])
    entries = sum(k * matrix.read(model).shape[1] for matrix in held.inputs)
    return MassiveWeights(
        layer=layer,
        module=part.ffn.module,
        expert=part.ffn.expert,
        indices=indices,
        magnitudes=tuple(abs(float(z[i])) for i in indices),
        shares=tuple(float(pieces[i]) / whole if whole else 0.0 for i in indices),
        median=median(z),
        count=massive_count(z, row),
        share_of_parameters=entries / parameters,
        dimension=origin.dimension,
        value=origin.value,
    )


def massive_count(z: Tensor, row: Tensor) -> int:
    """How many rows are truly massive for one output entry, ``W_down[d] @ z``: the fewest that make up 90 % of it.

    z: (I,), float64; row: ``W_down[d]``, (I,).
    """
    pieces = (row.to("cpu", z.dtype) * z)[z.abs().argsort(descending=True, stable=True)]
    whole = float(pieces.sum())
    running = (pieces.cumsum(0) / whole).tolist() if whole else []
    return next((n for n, share in enumerate(running, start=1) if share >= SHARE), len(running))


def to_protect(ffn: FFN, model: nn.Module, indices: Sequence[int], stream: Stream | None) -> tuple[Protected, ...]:
    """Rows of up and gate and columns of down, as places in the model's parameters; fused matrices are merged."""
    places: dict[tuple[str, int], list[int]] = {}
    for matrix in ffn.inputs:
        dim, rows = matrix.rows(list(indices), _shape(model, matrix.param))
        places.setdefault((matrix.param, dim), []).extend(rows)
    dim, columns = ffn.down.columns(list(indices), _shape(model, ffn.down.param))
    places.setdefault((ffn.down.param, dim), []).extend(columns)
    return tuple(
        Protected(
            parameter=name,
            checkpoint_name=name if stream is None else stream.checkpoint_name(name, ffn.expert),
            dim=dim,
            indices=tuple(entries),
            expert=ffn.expert,
        )
        for (name, dim), entries in places.items()
    )


def _shape(model: nn.Module, parameter: str) -> tuple[int, ...]:
    module, _, name = parameter.rpartition(".")
    return tuple(getattr(model.get_submodule(module), name).shape)
