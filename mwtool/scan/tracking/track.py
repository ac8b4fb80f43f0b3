"""How massive weights emerge: the checkpoints of one training run, scanned one after the other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mwtool.errors import BadValue
from mwtool.massive import Identity
from mwtool.models.load_options import On
from mwtool.models.locate import locate
from mwtool.models.source import ADAPTER_CONFIG, ADAPTER_FILES, Source
from mwtool.scan.definitions import median
from mwtool.scan.scanner import Scan, scan_checkpoint
from mwtool.scan.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from mwtool.scan.capture import LayerState
    from mwtool.scan.scanner import OnBytes, OnLayer

NUMBERED = re.compile(r"(?:checkpoint|step|iter|global_step)[-_]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stage:
    """A checkpoint to scan. model: folder or Hub id. name: as it is listed. step: as its name says, if it does."""

    model: str
    name: str
    revision: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """One layer for bos: largest and median |h|, kurtosis of h, and largest |z|."""

    hidden: float
    median: float
    kurtosis: float
    intermediate: float


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest entry of a state over the layers before the last."""

    layer: int
    index: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedMassive:
    """The massive layer of a checkpoint. rows: those that carry it. z: |z| of the first; value: h at `dimension`."""

    layer: int
    expert: int | None
    rows: tuple[int, ...]
    z: float
    dimension: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is kept of a checkpoint's scan.

    fingerprint: differs if the files do. massive: None where the definitions find no massive layer.
    hidden, intermediate: the largest |h| and |z| of bos over the layers before the last, massive or not.
    median: of |h| in the layer of `hidden`. kurtosis: of the h of bos, the largest over the same layers.
    """

    stage: Stage
    fingerprint: str
    massive: TrackedMassive | None
    hidden: Peak
    intermediate: Peak
    median: float
    kurtosis: float
    layers: tuple[LayerPeak, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Checkpoints by step, or as they were given where some state none.

    name: the folder or model they are of. notes: what was decided on the user's behalf in scanning them.
    """

    name: str
    settings: Settings
    identity: Identity
    dtype: str
    device: str
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()


def kurtosis(vector: Tensor) -> float:
    """Fourth moment about the mean over the squared variance (Pearson's): 3 for a normal distribution.

    For one entry far above N - 1 equal ones it is about N. vector: (N,). 0 where all entries are equal.
    """
    centred = vector - vector.mean()
    variance = float(centred.square().mean())
    return float(centred.pow(4).mean()) / variance**2 if variance > 0 else 0.0


def stages_in(folder: Path) -> tuple[Stage, ...]:
    """The checkpoints of a training run by step: folders like ``checkpoint-500`` or ``step_500`` that hold a model.

    Raises BadValue for a folder that is absent or has none.
    """
    if not folder.is_dir():
        raise BadValue(f"{folder} is no folder; expected one with folders named checkpoint-N")
    found = _numbered(folder)
    if not found:
        raise BadValue(f"{folder} has no folders named checkpoint-N; expected those that a trainer saves")
    return found


def _numbered(folder: Path) -> tuple[Stage, ...]:
    found = []
    for path in folder.iterdir():
        number = NUMBERED.fullmatch(path.name)
        if number is not None and path.is_dir():
            found.append(Stage(str(path), path.name, None, int(number[1])))
    return tuple(sorted(found, key=lambda one: one.step or 0))


def stages_of(models: Sequence[str], revisions: Sequence[str] = ()) -> tuple[Stage, ...]:
    """Models as they are given, or the revisions of one model; of one folder that holds checkpoints, these.

    Raises BadValue for several models with revisions.
    """
    if not revisions:
        if len(models) == 1 and Path(models[0]).is_dir() and (found := _numbered(Path(models[0]))):
            return found
        return tuple(Stage(model, model, None, _step(Path(model).name)) for model in models)
    if len(models) != 1:
        raise BadValue(f"--revisions are those of one model, and {len(models)} are given; expected one MODEL")
    return tuple(Stage(models[0], one, one, _step(one)) for one in revisions)


def _step(name: str) -> int | None:
    """The step that a name states: 1000 of ``stage1-step1000-tokens5B``; None where it states none."""
    found = NUMBERED.search(name)
    if found is not None:
        return int(found[1])
    return int(name) if name.isascii() and name.isdigit() else None


def track(
    name: str,
    stages: Sequence[Stage],
    settings: Settings | None = None,
    *,
    earlier: Track | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_layer: OnLayer | None = None,
    on_bytes: OnBytes | None = None,
    on_checkpoint: Callable[[Track, Checkpoint], None] | None = None,
) -> Track:
    """Scan every checkpoint, one decoder layer in memory at a time, and keep what changes over training.

    name: what they are called together. earlier: of a run that was interrupted, or of the same training when it was
    shorter: its checkpoints are not scanned again unless their files have changed, and those whose files are gone by
    now are kept. on_checkpoint: called after each one with all so far, and with it.
    PEFT adapters are merged into their base model as its weights are read.
    Raises BadValue for a revision of a local model, or a checkpoint of another shape or precision, and what
    `scan_checkpoint` raises.
    """
    settings = settings or Settings()
    wanted = {stage.name for stage in stages}
    points = {one.stage.name: one for one in (() if earlier is None else earlier.checkpoints)}
    gone = [one for one in points.values() if one.stage.name not in wanted]
    so_far = None if earlier is None else replace(earlier, checkpoints=tuple(gone))
    for one in gone:
        if on_checkpoint is not None and so_far is not None:
            on_checkpoint(so_far, one)
    done = {one.stage.name: one for one in gone}
    for stage in stages:
        source = _located(stage, trust=trust_remote_code)
        mark = fingerprint(source)
        old = points.get(stage.name)
        if old is not None and old.fingerprint == mark:
            point = old
        else:
            on: On = "base" if source.adapter is None else "merged"
            scan = scan_checkpoint(
                source, settings, dtype=dtype, device=device, on=on, on_layer=on_layer, on_bytes=on_bytes
            )
            so_far = so_far or _begun(name, settings, scan)
            _refuse_other(so_far, stage, scan)
            so_far = replace(so_far, notes=tuple(dict.fromkeys((*so_far.notes, *scan.notes))))
            point = _point(stage, mark, scan)
        done[stage.name] = point
        assert so_far is not None  # a checkpoint that is known comes from an earlier track
        so_far = replace(so_far, checkpoints=_ordered(done.values()))
        if on_checkpoint is not None:
            on_checkpoint(so_far, point)
    if so_far is None:
        raise BadValue("there is no checkpoint to track; expected at least one")
    return so_far


def _begun(name: str, settings: Settings, scan: Scan) -> Track:
    return Track(
        name=name, settings=settings, identity=scan.identity, dtype=scan.dtype, device=scan.device, checkpoints=()
    )


def _ordered(points: Iterable[Checkpoint]) -> tuple[Checkpoint, ...]:
    """By step where every one has a step, else as they came."""
    found = list(points)
    if all(one.stage.step is not None for one in found):
        found.sort(key=lambda one: one.stage.step or 0)
    return tuple(found)


def _refuse_other(so_far: Track, stage: Stage, scan: Scan) -> None:
    for what, found, expected in (
        ("shape", scan.identity.shape, so_far.identity.shape),
        ("model_type", scan.identity.model_type, so_far.identity.model_type),
        ("dtype", scan.dtype, so_far.dtype),
    ):
        if found != expected:
            raise BadValue(f"{stage.name} has {what} {found}; the checkpoints before it have {expected}")


def _located(stage: Stage, *, trust: bool) -> Source:
    source = replace(locate(stage.model, stage.revision, trust_remote_code=trust), download="auto")
    local = source.revision is None if source.adapter is None else Path(stage.model).is_dir()
    if stage.revision is not None and local:
        raise BadValue(f"{stage.model} is local and has no revisions; --revisions are those of a model on the Hub")
    return source


def fingerprint(source: Source) -> str:
    """Of a checkpoint's files: the commit on the Hub, else a digest of the names, sizes and times of its weights.

    Of a PEFT adapter, of its files and of its base model's.
    """
    if source.revision is not None and source.adapter is None:
        return source.revision
    files = [source.gguf.path] if source.gguf is not None else sorted(source.folder.glob("*"))
    state = hashlib.sha256((source.revision or "").encode())
    if source.adapter is not None:
        files += [Path(source.adapter) / name for name in (ADAPTER_CONFIG, *ADAPTER_FILES)]
    for path in files:
        weights = path.suffix in (".safetensors", ".bin", ".gguf")
        if path.exists() and (weights or path.name in ("config.json", ADAPTER_CONFIG)):
            about = path.stat()
            state.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def _point(stage: Stage, mark: str, scan: Scan) -> Checkpoint:
    layers = tuple(_layer(state) for state in scan.states)
    before = scan.states[:-1] or scan.states
    highest = max(before, key=lambda state: float(state.hidden.abs().max()))
    busiest = max(before, key=lambda state: float(state.intermediate.abs().max()))
    return Checkpoint(
        stage=stage,
        fingerprint=mark,
        massive=_massive(scan),
        hidden=_peak(highest.layer, highest.hidden),
        intermediate=_peak(busiest.layer, busiest.intermediate),
        median=layers[highest.layer].median,
        kurtosis=max(layers[state.layer].kurtosis for state in before),
        layers=layers,
    )


def _layer(state: LayerState) -> LayerPeak:
    return LayerPeak(
        float(state.hidden.abs().max()),
        median(state.hidden),
        kurtosis(state.hidden),
        float(state.intermediate.abs().max()),
    )


def _peak(layer: int, vector: Tensor) -> Peak:
    index = int(vector.abs().argmax())
    return Peak(layer, index, float(vector[index]))


def _massive(scan: Scan) -> TrackedMassive | None:
    one = scan.massive
    if one is None:
        return None
    return TrackedMassive(
        layer=one.layer,
        expert=one.expert,
        rows=one.indices[: max(1, min(one.count, len(one.indices)))],
        z=one.magnitudes[0],
        dimension=one.dimension,
        value=one.value,
    )
