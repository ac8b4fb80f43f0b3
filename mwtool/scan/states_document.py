"""What a scan found in whole texts as parts of its document, and triggers as a document of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwtool.files.document import envelope
from mwtool.scan.triggers import Triggers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mwtool.scan.positions import Placement, Positions, PositionState
    from mwtool.scan.scanner import Scan
    from mwtool.scan.sinks import Sinks

TRIGGERS = "mwtool.triggers/1"
TOKENS = 50
"""Tokens that a scan document lists; a document of triggers has them all."""


def envelope_of(schema: str, scan: Scan, command: str | None) -> dict[str, Any]:
    """The first keys of a document made from a scan."""
    one = scan.identity
    return envelope(
        schema,
        model=one.model,
        revision=one.revision,
        model_type=one.model_type,
        dtype=scan.dtype,
        device=scan.device,
        command=command,
    )


def states_of(scan: Scan) -> dict[str, Any]:
    """The keys of a scan document on whole texts, and how bos is routed in every layer."""
    return {
        "positions": None if scan.positions is None else _positions(scan.positions),
        "sinks": None if scan.sinks is None else _sinks(scan.sinks),
        "triggers": None if scan.triggers is None else _triggers(scan.triggers, TOKENS),
        "routing": [
            {"layer": state.layer, "probabilities": _short(state.probabilities.tolist())}
            for state in scan.states
            if state.probabilities is not None
        ]
        or None,
    }


def trigger_document(scan: Scan, command: str | None = None) -> dict[str, Any]:
    """The triggers of a scan as a document of schema mwtool.triggers/1: what others need to mask them.

    Raises ValueError for a scan without triggers.
    """
    from mwtool.files.schema import checked
    from mwtool.files.states_schema import TriggerDocument

    if scan.triggers is None:
        raise ValueError("the scan was made without a text to search for triggers")
    limits = scan.settings.thresholds
    document = {
        **envelope_of(TRIGGERS, scan, command),
        "magnitude": limits.magnitude,
        "ratio": limits.ratio,
        "bos": None if scan.bos.how == "none" else scan.bos.id,
        "triggers": _triggers(scan.triggers, None),
    }
    return checked(TriggerDocument, document)


def _short(values: Iterable[float]) -> list[float]:
    """Four significant digits: enough for a picture."""
    return [float(f"{value:.4g}") for value in values]


def _positions(found: Positions) -> dict[str, Any]:
    return {"text": found.text, "layer": found.layer, "placements": [_placement(one) for one in found.placements]}


def _placement(one: Placement) -> dict[str, Any]:
    return {
        "where": one.where,
        "at": one.at,
        "ids": list(one.ids),
        "tokens": list(one.tokens),
        "hidden": _states(one.hidden),
        "intermediate": _states(one.intermediate),
        "before": None if one.before is None else _short(one.before),
        "after": None if one.after is None else _short(one.after),
        "maps": [
            {"layer": found.layer, "weights": [_short(line[: at + 1]) for at, line in enumerate(found.weights)]}
            for found in one.maps
        ],
    }


def _states(states: Sequence[PositionState]) -> dict[str, Any]:
    return {
        "top": [[{"index": index, "value": value} for index, value in one.top] for one in states],
        "median": _short(one.median for one in states),
        "bins": [_short(one.bins) for one in states],
    }


def _sinks(found: Sinks) -> dict[str, Any]:
    return {
        "text": found.text,
        "windows": found.windows,
        "length": found.length,
        "eps": found.eps,
        "rate": found.rate,
        "layers": [
            {"layer": one.layer, "rate": one.rate, "heads": _short(one.rates), "scores": _short(one.scores)}
            for one in found.layers
        ],
    }


def _triggers(found: Triggers, most: int | None) -> dict[str, Any]:
    names = ("id", "token", "seen", "massive", "first", "layer", "dimension", "value")
    return {
        "text": found.text,
        "windows": found.windows,
        "length": found.length,
        "massive": found.massive,
        "first": found.first,
        "dimensions": [{"dimension": d, "positions": count} for d, count in found.dimensions],
        "different": len(found.tokens),
        "tokens": [{name: getattr(one, name) for name in names} for one in found.tokens[:most]],
    }
