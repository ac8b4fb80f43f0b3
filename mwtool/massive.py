"""The artifact every command shares: which rows of which layer are massive, as scan saves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from mwtool.errors import BadCheckpoint, BadValue
from mwtool.files.text import read_json

SCHEMA = "mwtool.scan/2"
ABLATION = "mwtool.ablate/1"
READABLE = ("mwtool.scan/1", SCHEMA, ABLATION)
"""Schemas whose `massive` and `shape` this version reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a scan must share with the model its rows are applied to.

    model, revision: may differ (a tuned or quantized variant), which is worth a warning.
    The rest must not: model type, number of decoder layers, H, I, experts a layer (None if dense).
    """

    model: str
    revision: str | None
    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    experts: int | None = None


class RankedRows(Protocol):
    """Ranked rows of one FFN: of a scan (`MassiveWeights`), or chosen by the user."""

    @property
    def layer(self) -> int:
        """The decoder layer, from 0."""
        ...

    @property
    def module(self) -> str:
        """The FFN's path."""
        ...

    @property
    def expert(self) -> int | None:
        """The routed expert; None if dense."""
        ...

    @property
    def indices(self) -> tuple[int, ...]:
        """Rows, the first ranked first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MassiveWeights:
    """The top-k massive weights (paper, section 3): rows of ``W_up`` and ``W_gate`` of one decoder layer.

    layer: decoder layer, from 0; module: its FFN's path; expert: routed expert, None if dense.
    indices: k row indices, by falling magnitude; magnitudes: |z| of bos there; median: of |z| over all I.
    shares: each row's part of the bias-free ``down_proj`` output at `dimension`, signed.
    count: how many top-ranked rows carry that output: the fewest that make up 90 % of it, without those at the end
        of the ranking with less than a tenth of the largest share; not capped by k.
    dimension, value: the massive dimension of the residual stream, and its value after that layer.
    share_of_parameters: entries of the k rows over all parameters, tied ones counted once.
    """

    layer: int
    module: str
    expert: int | None
    indices: tuple[int, ...]
    magnitudes: tuple[float, ...]
    shares: tuple[float, ...]
    median: float
    count: int
    share_of_parameters: float
    dimension: int
    value: float

    def document(self) -> dict[str, Any]:
        """The `massive` object of a scan document."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def load_massive(path: Path, model: Identity) -> tuple[MassiveWeights | None, list[str]]:
    """The rows of a saved scan, or of an ablation that attacked the rows of one event, for this model, and warnings.

    Raises BadValue if the file is neither, belongs to a model of another shape, or is an ablation of other rows.
    """
    if not path.exists():
        raise BadValue(f"there is no {path}; expected a document that `mwtool scan -o` wrote")
    try:
        document = read_json(path)
    except BadCheckpoint as fault:
        raise BadValue(str(fault)) from fault
    if document.get("schema") not in READABLE:
        raise BadValue(
            f"{path} has schema {document.get('schema')!r}; expected {SCHEMA!r}, as `mwtool scan -o` writes, "
            f"or {' or '.join(map(repr, (one for one in READABLE if one != SCHEMA)))}"
        )
    if document["schema"] == ABLATION and document.get("massive") is None:
        raise BadValue(
            f"{path} is an ablation of rows named by hand, or of several places, or of an older version; expected "
            f"one of a scan's rows: name the rows with --layer and --indices"
        )
    try:
        scanned = _identity(document)
        massive = None if document["massive"] is None else _parse(document["massive"], scanned)
    except (KeyError, TypeError, ValueError) as fault:
        raise BadValue(
            f"{path} is not a complete {document['schema']} document: {type(fault).__name__} {fault}"
        ) from fault
    _refuse_other_shape(path, scanned, model)
    return massive, _differences(path, scanned, model)


def _identity(document: Mapping[str, Any]) -> Identity:
    shape = document["shape"]
    names = ("layers", "hidden_size", "intermediate_size", "experts")  # of keys that newer versions add, none
    for name in ("model", "revision"):
        if not isinstance(document[name], str) and not (name == "revision" and document[name] is None):
            raise TypeError(f"{name} is {document[name]!r}; expected a text")
    return Identity(
        model=document["model"],
        revision=document["revision"],
        model_type=document["model_type"],
        **{name: shape[name] for name in names},
    )


def _parse(massive: Mapping[str, Any], scanned: Identity) -> MassiveWeights:
    values = {field.name: massive[field.name] for field in fields(MassiveWeights)}
    for name in ("indices", "magnitudes", "shares"):
        values[name] = tuple(values[name])
    one = MassiveWeights(**values)
    if fault := _fault(one, scanned):
        raise ValueError(fault)
    return one


def _fault(one: MassiveWeights, scanned: Identity) -> str | None:
    """What no scan would have written; rows are held against I where they are used, as it differs among layers."""
    if not _within(one.layer, scanned.layers):
        return f"layer {one.layer!r} of {scanned.layers!r}"
    if not _within(one.dimension, scanned.hidden_size):
        return f"dimension {one.dimension!r} of {scanned.hidden_size!r}"
    if one.expert is not None and not _within(one.expert, scanned.experts):
        return f"expert {one.expert!r} of {scanned.experts!r}"
    if not one.indices or not all(_within(i, i + 1) for i in one.indices) or len(set(one.indices)) < len(one.indices):
        return f"indices {list(one.indices)!r}; expected different row numbers"
    if not len(one.indices) == len(one.magnitudes) == len(one.shares):
        return f"{len(one.indices)} indices, {len(one.magnitudes)} magnitudes and {len(one.shares)} shares"
    return None


def _within(value: object, limit: object) -> bool:
    return isinstance(value, int) and isinstance(limit, int) and 0 <= value < limit


def _refuse_other_shape(path: Path, scanned: Identity, model: Identity) -> None:
    for name in ("model_type", "layers", "hidden_size", "intermediate_size", "experts"):
        found, expected = getattr(scanned, name), getattr(model, name)
        if found != expected:
            raise BadValue(f"{path} was made with {name} {found}; {model.model} has {expected}: scan it instead")


def _differences(path: Path, scanned: Identity, model: Identity) -> list[str]:
    if (scanned.model, scanned.revision) == (model.model, model.revision):
        return []

    def named(one: Identity) -> str:
        return one.model + (f" at {one.revision}" if one.revision else "")

    return [f"{path} was made with {named(scanned)}; it is used for {named(model)}"]
