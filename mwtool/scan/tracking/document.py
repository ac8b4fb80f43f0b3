"""Checkpoints over training as a document of schema mwtool.track/1, written and read again to go on from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadValue
from mwtool.files.document import envelope
from mwtool.massive import Identity
from mwtool.scan.tracking.track import Checkpoint, LayerPeak, Peak, Stage, Track, TrackedMassive

if TYPE_CHECKING:
    from mwtool.scan.settings import Settings
    from mwtool.scan.tracking.schema import TrackedCheckpoint

SCHEMA = "mwtool.track/1"


def track_document(found: Track, command: str | None = None) -> dict[str, Any]:
    """The document of a track, with all checkpoints scanned so far."""
    from mwtool.files.schema import checked
    from mwtool.scan.tracking.schema import TrackDocument

    document = {
        **envelope(
            SCHEMA,
            model=found.name,
            revision=None,
            model_type=found.identity.model_type,
            dtype=found.dtype,
            device=found.device,
            command=command,
        ),
        "shape": found.identity.shape,
        "settings": _settings(found.settings),
        "checkpoints": [_checkpoint(one) for one in found.checkpoints],
        "notes": list(found.notes),
    }
    return checked(TrackDocument, document)


def earlier_in(path: Path, name: str, settings: Settings, dtype: str = "auto") -> Track | None:
    """The track that a file holds, to go on from; None where there is no file.

    Raises BadValue for a file that is something else, or was made of other checkpoints or with other settings.
    """
    from mwtool.files.schema import read_document
    from mwtool.scan.tracking.schema import TrackDocument

    if not path.exists():
        return None
    _, read = read_document(path, {SCHEMA: TrackDocument}, "mwtool track -o")
    expected = {"model": name, **_settings(settings), "dtype": read.dtype if dtype == "auto" else dtype}
    found = {"model": read.model, **read.settings.model_dump(), "dtype": read.dtype}
    if Path(name).is_dir() and Path(read.model).is_dir() and Path(name).samefile(read.model):
        expected["model"] = read.model
    for key, value in expected.items():
        if found[key] != value:
            raise BadValue(
                f"{path} was made with {key} {found[key]!r}, and this run has {value!r}; give another -o, or remove "
                f"the file"
            )
    identity = Identity(model=read.model, revision=None, model_type=read.model_type, **read.shape.model_dump())
    return Track(
        name=name,
        settings=settings,
        identity=identity,
        dtype=read.dtype,
        device=read.device,
        checkpoints=tuple(map(_read, read.checkpoints)),
        notes=tuple(read.notes),
    )


def _settings(settings: Settings) -> dict[str, Any]:
    limits = settings.thresholds
    return {"k": settings.k, "bos": settings.bos, "magnitude": limits.magnitude, "ratio": limits.ratio}


def _checkpoint(one: Checkpoint) -> dict[str, Any]:
    return {
        "name": one.stage.name,
        "revision": one.stage.revision,
        "step": one.stage.step,
        "fingerprint": one.fingerprint,
        "massive": None if one.massive is None else {**asdict(one.massive), "rows": list(one.massive.rows)},
        "hidden": asdict(one.hidden),
        "intermediate": asdict(one.intermediate),
        "median": one.median,
        "kurtosis": one.kurtosis,
        "layers": [asdict(layer) for layer in one.layers],
    }


def _read(one: TrackedCheckpoint) -> Checkpoint:
    massive = one.massive
    return Checkpoint(
        stage=Stage(one.name, one.name, one.revision, one.step),
        fingerprint=one.fingerprint,
        massive=None if massive is None else TrackedMassive(**{**massive.model_dump(), "rows": tuple(massive.rows)}),
        hidden=Peak(**one.hidden.model_dump()),
        intermediate=Peak(**one.intermediate.model_dump()),
        median=one.median,
        kurtosis=one.kurtosis,
        layers=tuple(LayerPeak(**layer.model_dump()) for layer in one.layers),
    )
