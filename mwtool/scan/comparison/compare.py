"""Two scans side by side: which events, rows and super weights they share, and what follows for the lists made of one.

Events are matched by layer and dimension, rows by number, so both models must have the same shape, as a base model and
what was made of it by quantizing or fine-tuning have. Of models of different shapes only summaries are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mwtool.errors import BadValue
from mwtool.scan.comparison.verdict import differences, verdict

if TYPE_CHECKING:
    from mwtool.files.scan_schema import Event, Rows, ScanDocument
    from mwtool.scan.scanner import Scan

Where = Literal["both", "a", "b"]
Fate = Literal["kept", "moved", "lost", "new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """A row that carries an event in at least one of two scans.

    fate: `kept`, it carries in both at the same rank; `moved`, at another rank; `lost` and `new`, in A or B alone.
    rank: from 1, by falling |z|; None where the scan did not rank it. z: |z|; share: of what the FFN adds
        to the dimension.
    """

    row: int
    expert: int | None
    fate: Fate
    rank_a: int | None
    rank_b: int | None
    z_a: float | None
    z_b: float | None
    share_a: float | None
    share_b: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedEvent:
    """A layer that writes a massive dimension in at least one of two scans.

    found_in: where it is an event. written: what the FFN adds to the dimension; after: its value after the layer; both
    are None where the dimension is not massive in that scan, or the layer was not walked.
    """

    layer: int
    dimension: int
    found_in: Where
    kind_a: str | None
    kind_b: str | None
    written_a: float | None
    written_b: float | None
    after_a: float | None
    after_b: float | None
    z_a: float | None
    z_b: float | None
    rows: tuple[ComparedRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedDimension:
    """A dimension that is massive in at least one of two scans, by layer; None where it is not massive."""

    dimension: int
    values_a: tuple[float, ...] | None
    values_b: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSuperWeight:
    """An entry of a down projection that is a super weight in at least one of two scans."""

    layer: int
    expert: int | None
    hidden_dim: int
    ffn_index: int
    found_in: Where
    value_a: float | None
    value_b: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One scan in a few numbers, which can be compared whatever the shape.

    layer, count, z, over_median, value: of the massive layer and its rows; None where there is none.
    events, super_weights: how many. peak, peak_layer: largest |h| of any massive dimension, and where.
    """

    name: str
    layer: int | None
    count: int | None
    z: float | None
    over_median: float | None
    value: float | None
    events: int
    super_weights: int
    peak: float | None
    peak_layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two scans side by side.

    a, b: the scans. same_shape: whether layers, dimensions and rows correspond; where not, the lists below are empty.
    massive: the rows of the massive layer, where both scans have the same.
    said: what follows, in sentences. notes: differences in how the scans were made.
    """

    a: Summary
    b: Summary
    scan_a: ScanDocument
    scan_b: ScanDocument
    same_shape: bool
    events: tuple[ComparedEvent, ...]
    massive: tuple[ComparedRow, ...]
    dimensions: tuple[ComparedDimension, ...]
    super_weights: tuple[ComparedSuperWeight, ...]
    said: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document of schema mwtool.compare/1."""
        from mwtool.scan.comparison.document import compare_document

        return compare_document(self)


def compare_scans(a: Scan | Mapping[str, Any], b: Scan | Mapping[str, Any]) -> Comparison:
    """Two scans side by side: results of `scan_checkpoint` and `scan_model`, or their documents (mwtool.scan/2).

    Args:
        a: the first scan, such as that of a base model.
        b: what it is compared with, such as the same model quantized or fine-tuned.

    Returns:
        Events matched by layer and dimension, rows matched by number; only summaries where the shapes differ.

    Raises:
        BadValue: a document is not one of schema mwtool.scan/2.

    """
    return compare_documents(_document(a, "the first scan"), _document(b, "the second scan"))


def _document(scan: Scan | Mapping[str, Any], which: str) -> ScanDocument:
    from pydantic import ValidationError

    from mwtool.files.scan_schema import ScanDocument
    from mwtool.files.schema import complaint

    document = dict(scan) if isinstance(scan, Mapping) else scan.to_dict()
    try:
        return ScanDocument.model_validate(document)
    except ValidationError as fault:
        raise BadValue(f"{which} is no mwtool.scan/2 document: {complaint(fault)}") from fault


def compare_documents(a: ScanDocument, b: ScanDocument, names: tuple[str, str] | None = None) -> Comparison:
    """Two scan documents side by side. names: what to call them; by default the models that were scanned."""
    name_a, name_b = names or (a.model, b.model)
    same = a.shape == b.shape
    events = tuple(_events(a, b)) if same else ()
    one, other = a.massive, b.massive
    alike = same and one is not None and other is not None and one.layer == other.layer
    massive = compared_rows(one, other) if alike else ()
    return Comparison(
        a=_summary(a, name_a),
        b=_summary(b, name_b),
        scan_a=a,
        scan_b=b,
        same_shape=same,
        events=events,
        massive=massive,
        dimensions=tuple(_dimensions(a, b)) if same else (),
        super_weights=tuple(_super_weights(a, b)) if same else (),
        said=tuple(verdict(a, b, massive, events)),
        notes=tuple(differences(a, b)),
    )


def carrying(rows: Rows | None) -> tuple[int, ...]:
    """The rows that carry an event, as far as the scan ranked them."""
    return () if rows is None else tuple(rows.indices[: rows.count])


def compared_rows(a: Rows | None, b: Rows | None) -> tuple[ComparedRow, ...]:
    """The rows that carry in A, then those that carry in B alone. Rows of different experts are different rows."""
    one, other = _ranked(a), _ranked(b)
    in_a = [(None if a is None else a.expert, row) for row in carrying(a)]
    in_b = [(None if b is None else b.expert, row) for row in carrying(b)]
    return tuple(
        _row(key, _fate(key, in_a, in_b, one, other), one.get(key), other.get(key))
        for key in dict.fromkeys((*in_a, *in_b))
    )


Key = tuple[int | None, int]
"""Expert and row."""
Ranked = tuple[int, float, float]
"""Rank from 1, |z|, share."""


def _ranked(rows: Rows | None) -> dict[Key, Ranked]:
    if rows is None:
        return {}
    ranked = zip(rows.indices, rows.magnitudes, rows.shares, strict=True)
    return {(rows.expert, row): (rank, z, share) for rank, (row, z, share) in enumerate(ranked, start=1)}


def _fate(key: Key, in_a: Sequence[Key], in_b: Sequence[Key], one: dict[Key, Ranked], other: dict[Key, Ranked]) -> Fate:
    if key in in_a and key in in_b:
        return "kept" if one[key][0] == other[key][0] else "moved"
    return "lost" if key in in_a else "new"


def _row(key: Key, fate: Fate, one: Ranked | None, other: Ranked | None) -> ComparedRow:
    rank_a, z_a, share_a = one or (None, None, None)
    rank_b, z_b, share_b = other or (None, None, None)
    return ComparedRow(
        row=key[1],
        expert=key[0],
        fate=fate,
        rank_a=rank_a,
        rank_b=rank_b,
        z_a=z_a,
        z_b=z_b,
        share_a=share_a,
        share_b=share_b,
    )


def _events(a: ScanDocument, b: ScanDocument) -> Iterator[ComparedEvent]:
    in_a = {(event.layer, event.dimension): event for event in a.events}
    in_b = {(event.layer, event.dimension): event for event in b.events}
    for layer, dimension in sorted({*in_a, *in_b}):
        one, other = in_a.get((layer, dimension)), in_b.get((layer, dimension))
        written_a, after_a = _values(a, one, layer, dimension)
        written_b, after_b = _values(b, other, layer, dimension)
        yield ComparedEvent(
            layer=layer,
            dimension=dimension,
            found_in="both" if one and other else "a" if one else "b",
            kind_a=None if one is None else one.kind,
            kind_b=None if other is None else other.kind,
            written_a=written_a,
            written_b=written_b,
            after_a=after_a,
            after_b=after_b,
            z_a=None if one is None else one.rows.magnitudes[0],
            z_b=None if other is None else other.rows.magnitudes[0],
            rows=compared_rows(None if one is None else one.rows, None if other is None else other.rows),
        )


def _values(scan: ScanDocument, event: Event | None, layer: int, dimension: int) -> tuple[float | None, float | None]:
    """What a layer adds to a dimension, and its value after it."""
    if event is not None:
        return event.written, event.after
    trace = next((one for one in scan.dimensions if one.dimension == dimension), None)
    if trace is None or layer >= min(len(trace.values), len(trace.written)):
        return None, None
    return trace.written[layer], trace.values[layer]


def _dimensions(a: ScanDocument, b: ScanDocument) -> Iterator[ComparedDimension]:
    in_a = {one.dimension: tuple(one.values) for one in a.dimensions}
    in_b = {one.dimension: tuple(one.values) for one in b.dimensions}
    for dimension in dict.fromkeys((*in_a, *in_b)):
        yield ComparedDimension(dimension=dimension, values_a=in_a.get(dimension), values_b=in_b.get(dimension))


def _super_weights(a: ScanDocument, b: ScanDocument) -> Iterator[ComparedSuperWeight]:
    def placed(scan: ScanDocument) -> dict[tuple[Any, ...], float]:
        return {(one.layer, one.expert, one.hidden_dim, one.ffn_index): one.value for one in scan.super_weights}

    in_a, in_b = placed(a), placed(b)
    for key in dict.fromkeys((*in_a, *in_b)):
        layer, expert, hidden_dim, ffn_index = key
        yield ComparedSuperWeight(
            layer=layer,
            expert=expert,
            hidden_dim=hidden_dim,
            ffn_index=ffn_index,
            found_in="both" if key in in_a and key in in_b else "a" if key in in_a else "b",
            value_a=in_a.get(key),
            value_b=in_b.get(key),
        )


def _summary(scan: ScanDocument, name: str) -> Summary:
    rows = scan.massive
    peaks = [(abs(value), layer) for one in scan.dimensions for layer, value in enumerate(one.values)]
    peak, at = max(peaks, default=(None, None), key=lambda pair: pair[0])
    z = None if rows is None or not rows.magnitudes else rows.magnitudes[0]
    return Summary(
        name=name,
        layer=None if rows is None else rows.layer,
        count=None if rows is None else rows.count,
        z=z,
        over_median=z / rows.median if rows is not None and z is not None and rows.median > 0 else None,
        value=None if rows is None else rows.value,
        events=len(scan.events),
        super_weights=len(scan.super_weights),
        peak=peak,
        peak_layer=at,
    )
