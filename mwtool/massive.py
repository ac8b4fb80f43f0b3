"""The artifact every command shares: which rows of which layer are massive, as scan saves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.source import read_json

SCHEMA = "mwtool.scan/1"


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class MassiveWeights:
    """The top-k massive weights (paper, section 3): rows of ``W_up`` and ``W_gate`` of one decoder layer.

    layer: decoder layer, from 0; module: its FFN's path; expert: routed expert, None if dense.
    indices: k row indices, by falling magnitude; magnitudes: |z| of bos there; median: of |z| over all I.
    shares: each row's part of the bias-free ``down_proj`` output at `dimension`, signed.
    count: the fewest top-ranked rows that make up 90 % of that output; not capped by k.
    dimension, value: the massive dimension of the residual stream, and its value where it is settled.
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
        return asdict(self)


def load_massive(path: Path, model: Identity) -> tuple[MassiveWeights | None, list[str]]:
    """The rows of a saved scan, for this model, and warnings.

    Raises BadValue if the file is no scan document or belongs to a model of another shape.
    """
    document = read_json(path)
    if document.get("schema") != SCHEMA:
        raise BadValue(f"{path} has schema {document.get('schema')!r}; expected {SCHEMA!r}, as `mwtool scan -o` writes")
    try:
        scanned = Identity(document["model"], document["revision"], document["model_type"], **document["shape"])
        massive = None if document["massive"] is None else _parse(document["massive"])
    except (KeyError, TypeError, ValueError) as fault:
        raise BadValue(f"{path} is not a complete scan document: {type(fault).__name__} {fault}") from fault
    _refuse_other_shape(path, scanned, model)
    return massive, _differences(path, scanned, model)


def _parse(massive: Mapping[str, Any]) -> MassiveWeights:
    values = dict(massive)
    for name in ("indices", "magnitudes", "shares"):
        values[name] = tuple(values[name])
    return MassiveWeights(**values)


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
