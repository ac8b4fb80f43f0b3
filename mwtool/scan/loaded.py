"""Scan a model that is loaded: in memory, or from its files where it is offloaded or packed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mwtool.architecture.packed import packed_dtype
from mwtool.errors import UnsupportedModel
from mwtool.massive import MassiveWeights, load_massive
from mwtool.models.load import Loaded
from mwtool.models.offloaded_adapter import is_offloaded
from mwtool.models.quantization import dequantizable
from mwtool.scan.scanner import Scan, scan_checkpoint, scan_model
from mwtool.scan.settings import Settings


def massive_for(
    loaded: Loaded, file: Path | None = None, settings: Settings | None = None
) -> tuple[MassiveWeights | None, tuple[str, ...]]:
    """The massive weights of a saved scan, or of a scan done now, and what the user should know about them.

    Under `on="base"` the pre-trained model is scanned, its adapter switched off.
    """
    if file is not None:
        saved = load_massive(file, loaded.identity)
        return saved.massive, saved.notes
    scan = scan_loaded(loaded, settings)
    return scan.massive, scan.notes


def scan_loaded(loaded: Loaded, settings: Settings | None = None) -> Scan:
    """A scan of the model in memory; of the pre-trained one where an adapter is kept apart.

    One that is offloaded, or packed in a way that can be undone, is scanned from its files, a layer at a time, with the
    adapter if that is merged. Raises UnsupportedModel where it is packed otherwise, or was merged while it was packed.
    """
    down = [ffn.down for layer in loaded.layers for ffn in layer.ffns if not ffn.expert]  # one expert stands for all
    packed = next(filter(None, (packed_dtype(loaded.base, place) for place in down)), None)
    if packed and not dequantizable(loaded.source.config()):
        raise UnsupportedModel(
            f"{loaded.source.name} is quantized (packed {packed}) and cannot be scanned; scan the model it was made of "
            f"and give --massive FILE (or, to ablate, --layer and --indices)"
        )
    if packed or is_offloaded(loaded.base):
        return _scan_files(loaded, settings)
    model: Any = loaded.model
    with model.disable_adapter() if loaded.on == "base" else nullcontext():
        return scan_model(loaded.base, loaded.tokenizer, settings)


def _scan_files(loaded: Loaded, settings: Settings | None) -> Scan:
    if loaded.on == "merged" and not is_offloaded(loaded.base):
        raise UnsupportedModel(
            f"{loaded.source.name} is quantized, and no file holds its sum with {loaded.source.adapter} "
            f"that could be scanned; merge and save it with PEFT, or give it more memory"
        )
    source = replace(loaded.source, adapter=loaded.source.adapter if loaded.on == "merged" else None, notes=())
    return scan_checkpoint(
        source, settings, dtype=str(loaded.base.dtype).removeprefix("torch."), on=loaded.on or "base"
    )
