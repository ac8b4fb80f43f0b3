"""A quantization check as a document of schema mwtool.quantize-check/1; docs/json.md describes every key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwtool.evaluation.document import envelope_of, measured_document
from mwtool.files.document import finite

if TYPE_CHECKING:
    from mwtool.evaluation.comparison import Ratio
    from mwtool.models.load import Loaded
    from mwtool.quantization.check import QuantizeCheck, Share, Variant

SCHEMA = "mwtool.quantize-check/1"


def quantize_document(loaded: Loaded, found: QuantizeCheck, *, command: str | None = None) -> dict[str, Any]:
    """The document of a check of this model. Numbers that are not finite are null."""
    from mwtool.files.schema import checked
    from mwtool.quantization.schema import QuantizeDocument

    plan = found.plan
    document = {
        **envelope_of(SCHEMA, loaded, seed=plan.seed, command=command),
        "method": "round to nearest",
        "group": plan.group,
        "levels": plan.levels,
        "quantized_weights": found.weights,
        "baseline": [measured_document(one) for one in found.baseline],
        "variants": [_variant(one) for one in found.variants],
        "verdicts": list(found.verdicts),
        "notes": list(found.notes),
    }
    return checked(QuantizeDocument, document)


def _variant(one: Variant) -> dict[str, Any]:
    protection = one.protection
    return {
        "bits": one.scheme.bits,
        "protected": None if protection is None else protection.name,
        "kind": None if protection is None else protection.kind,
        "k": None if protection is None else protection.k,
        "control": protection is not None and protection.control,
        "kept_weights": 0 if protection is None else protection.weights,
        "kept_bytes": one.bytes,
        "results": [measured_document(measured) for measured in one.measured],
        "ratios": [_interval(ratio) for ratio in one.ratio],
        "shares_given_back": [_interval(share) for share in one.back],
    }


def _interval(one: Ratio | Share | None) -> dict[str, Any] | None:
    if one is None:
        return None
    values = {"value": one.value, "low": one.low, "high": one.high}
    return {name: None if value is None else finite(value) for name, value in values.items()}
