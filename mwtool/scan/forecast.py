"""What a scan takes, before it is run: memory from the headers of its files, and from a short trial time as well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.errors import UnsupportedModel
from mwtool.files.document import envelope
from mwtool.models.locate import locate
from mwtool.models.peak_memory import gpu_peak, process_peak, resident
from mwtool.scan.plan import ScanPlan, plan_scan
from mwtool.scan.scanner import scan_checkpoint
from mwtool.scan.settings import ByHand, Settings

SCHEMA = "mwtool.scan.plan/1"
SERIES = "mwtool.scans.plan/1"
TRIED_MODELS = 2
"""Of a series: the first pays for imports, the second shows what each of the others takes."""
TRIED = 3
"""Layers that a trial walks: the first of them pays for what is made once, the others show what a byte takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanForecast:
    """A plan and what it takes.

    process, gpu: bytes that the process is resident with, and that tensors take on the GPU, at most; None where that
    is not known. trial: seconds that the trial took, and rest: those of the layers that it left out; None without one.
    """

    plan: ScanPlan
    device: str
    process: int | None
    gpu: int | None
    trial: float | None
    rest: float | None


def forecast_scan(
    model: str,
    settings: Settings,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    trial: bool = False,
) -> ScanForecast:
    """What `scan_checkpoint` reads and takes with the same arguments. Raises what `plan_scan` raises.

    trial: whether to walk the first layers, which reads them: then memory is measured, and time is known.
    """
    marks: list[float] = []
    start = time.perf_counter()
    source = locate(model, revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    if trial:
        config = source.config()
        ends = (TRIED - 1, len(decoder_layers(adapter_for(config.model_type), config)) - 1, settings.last_layer)
        few = replace(settings, last_layer=min(end for end in ends if end is not None), by_hand=ByHand())
        scan_checkpoint(source, few, dtype=dtype, device=device, on_layer=lambda *_: marks.append(time.perf_counter()))
    took, process, gpu = time.perf_counter() - start, process_peak(), gpu_peak()
    plan = plan_scan(
        model, settings, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, gguf_file=gguf_file
    )
    if not trial:
        process, gpu = _by_shapes(plan, device)
    return ScanForecast(
        plan=plan,
        device=device,
        process=process,
        gpu=gpu,
        trial=took if trial else None,
        rest=rest_of(plan, marks) if trial else None,
    )


def rest_of(plan: ScanPlan, marks: Sequence[float]) -> float:
    """Seconds of the layers that a trial left out, by their bytes. marks: when each of the first ended.

    The first layer is left out: it pays for what is made once.
    """
    layers = plan.parts[1:]
    if len(marks) < 2 or len(layers) <= len(marks):  # noqa: PLR2004 # an interval has two ends
        return 0.0
    seconds = marks[-1] - marks[0]
    tried = sum(layer.size for layer in layers[1 : len(marks)])
    return seconds / max(1, tried) * sum(layer.size for layer in layers[len(marks) :])


def _by_shapes(plan: ScanPlan, device: str) -> tuple[int | None, int | None]:
    """Bytes of the process and of the GPU: this process as it is now, and the weights of the largest layer.

    Weights that are computed with as they are stored stay in the file's pages; others are read and then copied. What
    the libraries of a GPU take of the process is known only once they run.
    """
    if device != "cpu":
        return None, plan.computed
    now, peak = resident(), process_peak()
    if peak is None:
        return None, None
    return max(peak, now + plan.largest + (0 if plan.as_stored else plan.computed)), None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesForecast:
    """Scans one after the other, in one process. scans: at least one; trials are those of the first two."""

    scans: tuple[ScanForecast, ...]

    @property
    def size(self) -> int:
        """Bytes read."""
        return sum(one.plan.size for one in self.scans)

    @property
    def process(self) -> int | None:
        """Bytes that the process is resident with at most."""
        return max((one.process for one in self.scans if one.process is not None), default=None)

    @property
    def gpu(self) -> int | None:
        """Bytes of tensors on the GPU at most."""
        return max((one.gpu for one in self.scans if one.gpu is not None), default=None)

    def seconds(self, before: float) -> float | None:
        """From the start of the process, which `before` says; None without trials.

        Scans that were not tried go by the bytes of the last that was: the first pays for imports too.
        """
        tried = [(one, seconds_of(one, 0.0)) for one in self.scans]
        known = [(one, seconds) for one, seconds in tried if seconds is not None]
        if not known:
            return None
        last, took = known[-1]
        left = sum(one.plan.size for one, seconds in tried if seconds is None)
        return before + sum(seconds for _, seconds in known) + took * left / max(1, last.plan.size)


def forecast_series(
    models: Sequence[tuple[str, str | None]],
    settings: Settings,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    trial: bool = False,
) -> SeriesForecast:
    """What scans of these take, one after the other. models: each with its revision, None where it has none.

    Raises UnsupportedModel for a PEFT adapter, which is merged in memory, and what `forecast_scan` raises.
    """
    for model, revision in models:
        if locate(model, revision, trust_remote_code=trust_remote_code).adapter is not None:
            raise UnsupportedModel(
                f"{model} is a PEFT adapter, which is merged into its base model in memory; --dry-run tells scans that "
                f"read a checkpoint layer by layer"
            )
    return SeriesForecast(
        scans=tuple(
            forecast_scan(
                model,
                settings,
                revision=revision,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                trial=trial and at < TRIED_MODELS,
            )
            for at, (model, revision) in enumerate(models)
        )
    )


def document_of_series(found: SeriesForecast, command: str | None = None, *, before: float = 0.0) -> dict[str, Any]:
    """The document of schema mwtool.scans.plan/1; its first keys are about the first model."""
    first = found.scans[0]
    head = envelope(
        SERIES,
        model=first.plan.model,
        revision=first.plan.revision,
        model_type=first.plan.model_type,
        dtype=first.plan.dtype,
        device=first.device,
        command=command,
    )
    kept = ("model", "revision", "layers", "walked", "bytes_read", "files", "cached", "bytes_of_files", "memory")
    scans = [{name: value for name, value in document_of(one).items() if name in kept} for one in found.scans]
    return {
        **head,
        "scans": scans,
        "bytes_read": found.size,
        "memory": {"process": found.process, "gpu": found.gpu},
        "total_seconds": found.seconds(before),
    }


def document_of(found: ScanForecast, command: str | None = None, *, before: float = 0.0) -> dict[str, Any]:
    """The document of schema mwtool.scan.plan/1. before: seconds from the start of the process to the forecast."""
    plan = found.plan
    head = envelope(
        SCHEMA,
        model=plan.model,
        revision=plan.revision,
        model_type=plan.model_type,
        dtype=plan.dtype,
        device=found.device,
        command=command,
    )
    return {
        **head,
        "layers": plan.layers,
        "walked": len(plan.parts) - 1,
        "parts": [asdict(part) for part in plan.parts],
        "bytes_read": plan.size,
        "files": plan.files,
        "cached": plan.cached,
        "bytes_of_files": plan.whole,
        "experts": plan.experts,
        "memory": {"weights": plan.computed, "process": found.process, "gpu": found.gpu},
        "total_seconds": seconds_of(found, before),
    }


def seconds_of(found: ScanForecast, before: float) -> float | None:
    """Of the whole scan, from the start of its process; None without a trial."""
    return None if found.trial is None or found.rest is None else before + found.trial + found.rest
