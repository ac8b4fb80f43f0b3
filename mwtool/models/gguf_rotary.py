"""Rotary positions of a GGUF file in transformers' terms.

A scan does not depend on them: it feeds one token at the first position, where the rotation is by zero and
attention has one key to look at. Texts do, so a model that is loaded whole must have them right.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mwtool.errors import BadCheckpoint
from mwtool.models.gguf_metadata import Metadata

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of factors for the frequencies; what they do is part of the configuration in transformers."""
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
"""Of Llama 3's scaling, as all released models have it; a GGUF file holds but the factors that result."""
_PLAIN = ("none", "linear", "yarn")


def rotary(data: Metadata, width: int) -> tuple[dict[str, Any], str | None]:
    """`rope_parameters` for heads of this width, and what in the file they do not express; None if nothing."""
    theta = data.number("rope.freq_base", 10000.0)
    turned = data.count("rope.dimension_count", width)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if turned > width:
        raise BadCheckpoint(
            f"{data.header.path} states {data.architecture}.rope.dimension_count {turned:,}; "
            f"a head has {width:,} entries"
        )
    if data.architecture == "phi3":
        plain["partial_rotary_factor"] = turned / width
    elif turned != width:
        return plain, f"rotary positions of {turned} of {width} entries of a head"
    if "rope_freqs.weight" in data.tensors:
        return _llama3(data, plain, width)
    if "rope_factors_long.weight" in data.tensors:
        return _longrope(data, plain, turned)
    return _scaled(data, plain)


def _scaled(data: Metadata, plain: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    kind = data.text("rope.scaling.type", "none")
    if kind not in _PLAIN:
        return plain, f"rotary scaling {kind!r}"
    known = {"type", "factor", "original_context_length", "finetuned"}
    prefix = f"{data.architecture}.rope.scaling."
    others = sorted({key.removeprefix(prefix) for key in data.header.metadata if key.startswith(prefix)} - known)
    if kind == "none" or data.number("rope.scaling.factor", 1.0) == 1.0:
        return plain, None
    if others:
        return plain, f"rotary scaling with {others[0]}"
    scaled = {**plain, "rope_type": kind, "factor": data.number("rope.scaling.factor")}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = data.count("rope.scaling.original_context_length")
    return scaled, None


def _llama3(data: Metadata, plain: dict[str, Any], width: int) -> tuple[dict[str, Any], str | None]:
    """Llama 3's scaling, recognised by the factors it leads to."""
    found = _factors(data, "rope_freqs.weight", width // 2)
    factor = round(float(found.max()), 3)
    if np.allclose(found, llama3_factors(plain["rope_theta"], width, factor), rtol=1e-4, atol=0):
        scaling = {"low_freq_factor": LOW, "high_freq_factor": HIGH, "original_max_position_embeddings": ORIGINAL}
        return {**plain, "rope_type": "llama3", "factor": factor, **scaling}, None
    if np.all(found == 1):
        return plain, None
    return plain, "rope_freqs.weight, whose factors are not those of Llama 3's scaling"


def llama3_factors(theta: float, width: int, factor: float) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by, (width / 2,), as llama.cpp's converter computes it."""
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (index / width)
        if wavelength < ORIGINAL / HIGH:
            factors.append(1.0)
        elif wavelength > ORIGINAL / LOW:
            factors.append(factor)
        else:
            smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


def _longrope(data: Metadata, plain: dict[str, Any], turned: int) -> tuple[dict[str, Any], str | None]:
    """Phi-3's factors for short and long texts; their attention factor follows from the two context lengths."""
    long, short = (_factors(data, f"rope_factors_{which}.weight", turned // 2) for which in ("long", "short"))
    original = data.count("rope.scaling.original_context_length")
    parameters = {
        **plain,
        "rope_type": "longrope",
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "original_max_position_embeddings": original,
    }
    scale = max(1.0, data.count("context_length") / original)
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if original > 1 else 1.0
    stated = data.number("rope.scaling.attn_factor", usual)
    if not math.isclose(stated, usual, rel_tol=1e-4):
        return parameters, f"rope.scaling.attn_factor {stated:g}, where its context lengths make it {usual:g}"
    return parameters, None


def _factors(data: Metadata, name: str, count: int) -> np.ndarray:
    """A tensor of float32 factors, which are few, read at once."""
    (found,) = data.shape(name, 1)
    entry = data.tensors[name]
    if found != count or entry.block_type.name != "F32":
        raise BadCheckpoint(
            f"{data.header.path}: tensor {name} holds {found} x {entry.block_type.name}; expected {count} x F32"
        )
    with data.header.path.open("rb") as file:
        file.seek(entry.offset)
        factors = np.frombuffer(file.read(entry.nbytes), np.float32)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise BadCheckpoint(f"{data.header.path}: tensor {name} holds factors that are not above 0; it is damaged")
    return factors
