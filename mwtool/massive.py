"""The artifact every command shares: which rows of which layer are massive, as scan saves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mwtool.errors import BadValue

if TYPE_CHECKING:
    from mwtool.files.scan_schema import Rows

SCHEMA = "mwtool.scan/2"
ABLATION = "mwtool.ablate/1"


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

    @property
    def shape(self) -> dict[str, int | None]:
        """The `shape` object of a document."""
        return {name: getattr(self, name) for name in ("layers", "hidden_size", "intermediate_size", "experts")}


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
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedEvent:
    """The ranked rows of one event of a scan, with its number there."""

    event: int
    kind: Literal["up", "down"]
    rows: MassiveWeights

    def document(self) -> dict[str, Any]:
        """An entry of `events` in an ablation's document."""
        return {"event": self.event, "kind": self.kind, "rows": self.rows.document()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRows:
    """What other commands take from a document: of a scan, or of an ablation, whose events are those it attacked.

    massive: None where a scan found no massive weights. notes: what the user should know about the file.
    """

    massive: MassiveWeights | None
    events: tuple[RankedEvent, ...]
    notes: tuple[str, ...]


def load_massive(path: Path, model: Identity) -> SavedRows:
    """The massive weights of a saved scan, or of an ablation that attacked the rows of one event, for this model.

    Raises BadValue if the file is neither, belongs to a model of another shape, or is an ablation of other rows.
    """
    ablation, found = _read(path, model)
    if ablation and found.massive is None:
        several = ", ".join(str(one.event) for one in found.events)
        raise BadValue(
            f"{path} is an ablation of events {several} together; add --event all, or name one of them"
            if several
            else f"{path} is an ablation of rows named by hand, or of several layers, or of an older version; expected "
            f"one of a scan's rows: name the rows with --layer and --indices"
        )
    return found


def load_events(path: Path, model: Identity) -> SavedRows:
    """The events of a saved scan, or those an ablation attacked, for this model.

    Raises BadValue if the file is neither, belongs to a model of another shape, or has no events.
    """
    _, found = _read(path, model)
    if not found.events:
        raise BadValue(
            f"{path} has no events; expected a scan of schema {SCHEMA} that found some: scan the model again"
        )
    return found


def _read(path: Path, model: Identity) -> tuple[bool, SavedRows]:
    """Whether the file is an ablation, and what it holds."""
    from mwtool.files.scan_schema import AblationRows, ScanDocument, ScanDocument1, Scanned
    from mwtool.files.schema import read_document

    models: dict[str, type[Scanned]] = {SCHEMA: ScanDocument, "mwtool.scan/1": ScanDocument1, ABLATION: AblationRows}
    _, found = read_document(path, models, "mwtool scan -o")
    scanned = Identity(
        model=found.model, revision=found.revision, model_type=found.model_type, **found.shape.model_dump()
    )
    _refuse_other_shape(path, scanned, model)
    numbered: list[tuple[int, Any]] = []
    if isinstance(found, ScanDocument):
        numbered = list(enumerate(found.events))
    elif isinstance(found, AblationRows):
        numbered = [(one.event, one) for one in found.events]
    events = tuple(RankedEvent(event=number, kind=one.kind, rows=_weights(one.rows)) for number, one in numbered)
    massive = None if found.massive is None else _weights(found.massive)
    notes = tuple(_differences(path, scanned, model))
    return isinstance(found, AblationRows), SavedRows(massive=massive, events=events, notes=notes)


def _weights(found: Rows) -> MassiveWeights:
    """Those of a valid document; rows are held against I where they are used, as it differs among layers."""
    values: dict[str, Any] = found.model_dump()
    values |= {key: tuple(one) for key, one in values.items() if isinstance(one, list)}
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
