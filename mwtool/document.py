"""Results as JSON documents: one envelope for all commands, and writing that leaves nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import stat
import tempfile
from contextlib import suppress
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool import __version__
from mwtool.analysis import median
from mwtool.errors import OutputError
from mwtool.massive import SCHEMA
from mwtool.published import published

if TYPE_CHECKING:
    from torch import Tensor

    from mwtool.ranking import Router
    from mwtool.scan import Scan

TOP = 3
"""Entries listed for each layer's hidden and intermediate state."""
INCOMPLETE = ".incomplete"


def envelope(
    schema: str, *, model: str, revision: str | None, model_type: str, dtype: str, device: str
) -> dict[str, Any]:
    """What every document begins with: enough to tell what was run on what."""
    return {
        "schema": schema,
        "mwtool_version": __version__,
        "model": model,
        "revision": revision,
        "model_type": model_type,
        "dtype": dtype,
        "device": device,
        "seed": None,
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "command": None,
    }


def scan_document(scan: Scan, command: str | None = None) -> dict[str, Any]:
    """A scan as a document of schema mwtool.scan/1; docs/json.md describes every key."""
    one, bos, limits = scan.identity, scan.bos, scan.settings.thresholds
    known = published(one.model)
    return {
        **envelope(
            SCHEMA,
            model=one.model,
            revision=one.revision,
            model_type=one.model_type,
            dtype=scan.dtype,
            device=scan.device,
        ),
        "command": command,
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
        "super_weights": [
            {
                "layer": w.layer,
                "hidden_dim": w.hidden_dim,
                "ffn_index": w.ffn_index,
                "value": w.value,
                "expert": w.expert,
            }
            for w in scan.super_weights
        ],
        "weights": [
            {
                "parameter": p.parameter,
                "checkpoint_name": p.checkpoint_name,
                "expert": p.expert,
                "dim": p.dim,
                "indices": list(p.indices),
            }
            for p in scan.protect
        ],
        "sun": {
            "found": bool(scan.sun),
            "entries": [{"layer": layer, "index": index, "value": value} for layer, index, value in scan.sun],
        },
        "published": None
        if known is None or scan.massive is None
        else {
            "layer": known.layer,
            "expert": known.expert,
            "indices": list(known.indices),
            "agreement": known.agreement(scan.massive.layer, scan.massive.indices),
        },
        "notes": list(scan.notes),
    }


def _router(router: Router) -> dict[str, Any]:
    choices = [
        {"expert": c.expert, "probability": c.probability, "weight": c.weight, "share": c.share} for c in router.choices
    ]
    return {"layer": router.layer, "probabilities": choices, "shared_share": router.shared_share}


def text_of(document: dict[str, Any]) -> str:
    """The document as it is printed and written, in ASCII: a terminal need not know a tokenizer's characters.

    Numbers are finite by construction; anything else is a bug.
    """
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def check_writable(path: Path) -> None:
    """Raise OutputError before the work begins if its result could not be written to `path` after it."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected a file name")
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist; make it, or write elsewhere")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path} cannot be written: no permission")


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: under a temporary name beside it, then moved into place.

    What a killed process left under such a name is removed. Pipes and devices are written to directly.
    Raises OutputError.
    """
    temporary: str | None = None
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays a link; what it points to is replaced
        _clear(target)
        handle, temporary = _claim(target)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(target)  # before the lock goes with the handle
        temporary = None
    except OSError as fault:
        raise OutputError(f"{path} cannot be written: {fault.strerror or fault}; nothing was left there") from fault
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _claim(target: Path) -> tuple[int, str]:
    """A new file beside `target`, open and locked, and its name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=INCOMPLETE, dir=target.parent)
        with suppress(OSError):  # a file system without locks: nothing is cleared there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # cleared by another process before it was locked


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}."  # a name may take 255 bytes, and so may the temporary one


def _clear(target: Path) -> None:
    """Remove what killed processes left beside `target`: nobody holds it."""
    for left in target.parent.glob(f"{escape(_prefix(target))}*{INCOMPLETE}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _summary(vector: Tensor) -> dict[str, Any]:
    top = vector.abs().argsort(descending=True, stable=True)[:TOP].tolist()
    return {"top": [{"index": i, "value": float(vector[i])} for i in top], "median": median(vector)}
