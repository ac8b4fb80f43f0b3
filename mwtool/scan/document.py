"""A scan as a document of schema mwtool.scan/1; docs/json.md describes every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwtool.files.document import envelope
from mwtool.massive import SCHEMA
from mwtool.scan.capture import SuperWeight
from mwtool.scan.definitions import median
from mwtool.scan.published import published
from mwtool.scan.ranking import Protected, Router
from mwtool.scan.scanner import Scan

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
"""Entries listed for each layer's hidden and intermediate state."""


def scan_document(scan: Scan, command: str | None = None) -> dict[str, Any]:
    """A scan as a document of schema mwtool.scan/1."""
    one, bos, limits = scan.identity, scan.bos, scan.settings.thresholds
    return {
        **envelope(
            SCHEMA,
            model=one.model,
            revision=one.revision,
            model_type=one.model_type,
            dtype=scan.dtype,
            device=scan.device,
            command=command,
        ),
        "shape": {
            "layers": one.layers,
            "hidden_size": one.hidden_size,
            "intermediate_size": one.intermediate_size,
            "experts": one.experts,
        },
        "parameters": scan.parameters,
        "thresholds": {
            "magnitude": limits.magnitude,
            "ratio": limits.ratio,
            "sun_ratio": limits.sun_ratio,
            "spike": limits.spike,
        },
        "bos": {"id": bos.id, "token": bos.token, "how": bos.how},
        "massive": None if scan.massive is None else scan.massive.document(),
        "router": None if scan.router is None else _router(scan.router),
        "settled": scan.settled,
        "attribution": [{"layer": layer, "share": share} for layer, share in enumerate(scan.attribution)],
        "growth": None if scan.growth is None else {"layer": scan.growth[0], "value": scan.growth[1]},
        "intermediate_peak_layer": scan.intermediate_peak_layer,
        "layers_walked": len(scan.states),
        "stopped": scan.stopped,
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
        "notes": list(scan.notes),
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
    if known is None or scan.massive is None:
        return None
    return {
        "layer": known.layer,
        "expert": known.expert,
        "indices": list(known.indices),
        "agreement": known.agreement(scan.massive.layer, scan.massive.indices),
    }


def _router(router: Router) -> dict[str, Any]:
    choices = [
        {"expert": c.expert, "probability": c.probability, "weight": c.weight, "share": c.share} for c in router.choices
    ]
    return {"layer": router.layer, "probabilities": choices, "shared_share": router.shared_share}


def _summary(vector: Tensor) -> dict[str, Any]:
    top = vector.abs().argsort(descending=True, stable=True)[:TOP].tolist()
    return {"top": [{"index": i, "value": float(vector[i])} for i in top], "median": median(vector)}
