"""A comparison of two scans as a document of schema mwtool.compare/1; docs/json.md describes every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mwtool.files.document import envelope

if TYPE_CHECKING:
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.scan.comparison.compare import (
        ComparedDimension,
        ComparedEvent,
        ComparedRow,
        ComparedSuperWeight,
        Comparison,
        Summary,
    )

SCHEMA = "mwtool.compare/1"


def compare_document(found: Comparison, command: str | None = None) -> dict[str, Any]:
    """The document of a comparison. Its first keys are those of A's scan; `a` and `b` describe both."""
    from mwtool.files.schema import checked
    from mwtool.scan.comparison.schema import CompareDocument

    one = found.scan_a
    document = {
        **envelope(
            SCHEMA,
            model=one.model,
            revision=one.revision,
            model_type=one.model_type,
            dtype=one.dtype,
            device=one.device,
            command=command,
        ),
        "a": _side(found.a, found.scan_a),
        "b": _side(found.b, found.scan_b),
        "same_shape": found.same_shape,
        "events": [_lists(event) for event in found.events],
        "massive": [asdict(row) for row in found.massive],
        "dimensions": [_lists(dimension) for dimension in found.dimensions],
        "super_weights": [_lists(weight) for weight in found.super_weights],
        "said": list(found.said),
        "notes": list(found.notes),
    }
    return checked(CompareDocument, document)


def _side(summary: Summary, scan: ScanDocument) -> dict[str, Any]:
    names = ("model", "revision", "model_type", "dtype", "device", "mwtool_version")
    return {**asdict(summary), **{name: getattr(scan, name) for name in names}, "shape": scan.shape.model_dump()}


def _lists(one: ComparedEvent | ComparedDimension | ComparedSuperWeight | ComparedRow) -> dict[str, Any]:
    """Its fields, tuples as the lists that JSON has."""
    return {
        key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in asdict(one).items()
    }
