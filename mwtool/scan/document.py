"""A scan as a document of schema mwtool.scan/2; docs/json.md describes every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwtool.massive import SCHEMA
from mwtool.scan.capture import SuperWeight
from mwtool.scan.definitions import Event, Trace, Write, median
from mwtool.scan.protect import Protected
from mwtool.scan.published import published
from mwtool.scan.ranking import Router
from mwtool.scan.scanner import Scan
from mwtool.scan.states_document import envelope_of, states_of

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
"""Entries listed for each layer's hidden and intermediate state."""


def scan_document(scan: Scan, command: str | None = None, check: dict[str, Any] | None = None) -> dict[str, Any]:
    """A scan as a document of schema mwtool.scan/2. check: its `check` object, where one was made."""
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.files.schema import checked

    one, bos, limits = scan.identity, scan.bos, scan.settings.thresholds
    document = {
        **envelope_of(SCHEMA, scan, command),
        "shape": one.shape,
        "parameters": scan.parameters,
        "thresholds": {
            "magnitude": limits.magnitude,
            "ratio": limits.ratio,
            "sun_ratio": limits.sun_ratio,
            "spike": limits.spike,
        },
        "bos": {"id": bos.id, "token": bos.token, "how": bos.how},
        "massive": None if scan.massive is None else scan.massive.document(),
        "massive_event": scan.massive_event,
        "absence": scan.absence,
        "by_hand": _by_hand(scan),
        "router": None if scan.router is None else _router(scan.router),
        "events": [_event(event, places) for event, places in zip(scan.events, scan.event_protect, strict=True)],
        "check": check,
        "dimensions": [_trace(one) for one in scan.dimensions],
        "layers_walked": len(scan.states),
        "partial": scan.partial,
        "layers": [
            {"layer": state.layer, "hidden": _summary(state.hidden), "intermediate": _summary(state.intermediate)}
            for state in scan.states
        ],
        "super_weights": [_super_weight(one) for one in scan.super_weights],
        "weights": [_place(one) for one in scan.protect],
        "sun": {
            "found": bool(scan.sun),
            "entries": [{"layer": layer, "index": index, "value": value} for layer, index, value in scan.sun],
        },
        "published": _published(scan),
        **states_of(scan),
        "unread": [{"parameter": one.parameter, "layers": list(one.layers)} for one in scan.unread],
        "notes": list(scan.notes),
    }
    return checked(ScanDocument, document)


def layer_records(scan: Scan) -> list[dict[str, Any]]:
    """One line a layer: the largest entry and the median of both states, and the event there."""
    kinds = {event.layer: event.kind for event in scan.events}
    records = []
    for state in scan.states:
        hidden, intermediate = _summary(state.hidden), _summary(state.intermediate)
        records.append(
            {
                "layer": state.layer,
                "hidden_index": hidden["top"][0]["index"],
                "hidden_value": hidden["top"][0]["value"],
                "hidden_median": hidden["median"],
                "intermediate_index": intermediate["top"][0]["index"],
                "intermediate_value": intermediate["top"][0]["value"],
                "intermediate_median": intermediate["median"],
                "event": kinds.get(state.layer),
            }
        )
    return records


def event_records(scan: Scan) -> list[dict[str, Any]]:
    """One line an event."""
    return [
        {
            "layer": event.layer,
            "kind": event.kind,
            "dimension": event.dimension,
            "written": event.written,
            "before": event.before,
            "after": event.after,
            "rows": list(event.rows.indices),
        }
        for event in scan.events
    ]


def _event(event: Event, places: tuple[Protected, ...]) -> dict[str, Any]:
    return {
        "layer": event.layer,
        **_write(event),
        "others": [_write(one) for one in event.others],
        "rows": event.rows.document(),
        "weights": [_place(one) for one in places],
    }


def _write(one: Write) -> dict[str, Any]:
    return {
        "dimension": one.dimension,
        "kind": one.kind,
        "flip": one.flip,
        "written": one.written,
        "before": one.before,
        "after": one.after,
        "lives": one.lives,
    }


def _trace(one: Trace) -> dict[str, Any]:
    return {"dimension": one.dimension, "values": list(one.values), "written": list(one.written)}


def _by_hand(scan: Scan) -> dict[str, Any] | None:
    chosen = scan.settings.by_hand
    if not chosen:
        return None
    return {
        "event": chosen.event,
        "layer": chosen.layer,
        "expert": chosen.expert,
        "indices": list(chosen.indices) or None,
    }


def _super_weight(one: SuperWeight) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "hidden_dim": one.hidden_dim,
        "ffn_index": one.ffn_index,
        "value": one.value,
        "expert": one.expert,
    }


def _place(one: Protected) -> dict[str, Any]:
    return {
        "parameter": one.parameter,
        "checkpoint_name": one.checkpoint_name,
        "expert": one.expert,
        "dim": one.dim,
        "indices": list(one.indices),
    }


def _published(scan: Scan) -> dict[str, Any] | None:
    known = published(scan.identity.model)
    if known is None:
        return None
    found = {(one.layer, one.hidden_dim, one.ffn_index) for one in scan.super_weights}
    rows = known.rows
    return {
        "layer": None if rows is None else rows.layer,
        "expert": None if rows is None else rows.expert,
        "indices": None if rows is None else list(rows.indices),
        "source": None if rows is None else rows.source,
        "agreement": None
        if rows is None or scan.massive is None
        else rows.agreement(scan.massive.layer, scan.massive.indices),
        "super_weights": [
            {"layer": layer, "hidden_dim": dim, "ffn_index": index, "found": (layer, dim, index) in found}
            for layer, dim, index in known.super_weights
        ],
    }


def _router(router: Router) -> dict[str, Any]:
    choices = [
        {"expert": c.expert, "probability": c.probability, "weight": c.weight, "share": c.share} for c in router.choices
    ]
    return {"layer": router.layer, "probabilities": choices, "shared_share": router.shared_share}


def _summary(vector: Tensor) -> dict[str, Any]:
    top = vector.abs().argsort(descending=True, stable=True)[:TOP].tolist()
    return {"top": [{"index": i, "value": float(vector[i])} for i in top], "median": median(vector)}
