"""A checkpoint's tensors by name, read in place: safetensors, one file or sharded, GGUF, or legacy ``.bin``.

Tensors are memory-mapped. A file is opened anew for every read and closed after it, so
that the pages of a layer leave memory together with its tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from mwtool.errors import BadCheckpoint
from mwtool.files.text import read_json
from mwtool.models.gguf_checkpoint import lazy_tensors
from mwtool.models.gguf_header import LFS_POINTER
from mwtool.models.source import Source

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(slots=True)
class Checkpoint:
    """Tensor name -> file, and the tensors themselves on request.

    files: which file holds which tensor.
    legacy: tensors of ``.bin`` files, which can only be opened whole; None for safetensors.
    """

    source: Source
    files: dict[str, str]
    legacy: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors by name, not read yet, alive inside the block; what was read from them stays alive after it.

        As of safetensors' slices, `[...]` reads one whole and `[i:j]` these rows.

        Raises BadCheckpoint if a file is absent, cut short or lacks the tensor.
        """
        names = list(names)
        if self.source.gguf is not None:
            gguf = self.source.gguf
            with lazy_tensors(gguf.header.tensors, {name: gguf.conversion.tensors[name] for name in names}) as lazy:
                yield lazy
            return
        if self.legacy is not None:
            yield {name: self.legacy[name] for name in names}
            return
        with ExitStack() as stack:
            opened = {file: stack.enter_context(self._open(file)) for file in {self.files[name] for name in names}}
            yield {name: _slice(opened[self.files[name]], name, self.files[name]) for name in names}

    def stored_name(self, name: str) -> str:
        """What the file itself calls a tensor: GGUF has names of its own."""
        return name if self.source.gguf is None else self.source.gguf.conversion.tensors[name].tensor

    def _open(self, file: str) -> Any:
        path = self.source.path(file)
        if path is None:
            raise BadCheckpoint(
                f"{self.source.name}: {SAFETENSORS_INDEX} names {file}, which is not there; get it again"
            )
        return open_safetensors(path)


def open_checkpoint(source: Source) -> Checkpoint:
    """Find a model's weight files, as `from_pretrained` does: safetensors before ``.bin``.

    Raises BadCheckpoint if there are none or the index is damaged.
    """
    if source.gguf is not None:
        entries = source.gguf.header.tensors
        return Checkpoint(
            source, {name: entries[one.tensor].file.name for name, one in source.gguf.conversion.tensors.items()}
        )
    if (source.folder / SAFETENSORS).exists():
        return _single(source)
    if (source.folder / SAFETENSORS_INDEX).exists():
        return Checkpoint(source, _weight_map(source, SAFETENSORS_INDEX))
    if (source.folder / LEGACY_INDEX).exists():
        return _legacy(source, sorted(set(_weight_map(source, LEGACY_INDEX).values())))
    if source.path(SAFETENSORS) is not None:
        return _single(source)
    if source.path(LEGACY) is not None:
        return _legacy(source, [LEGACY])
    expected = f"expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {LEGACY} or {LEGACY_INDEX}"
    raise BadCheckpoint(f"{source.name} has no weights; {expected}, or --gguf-file NAME for one of its GGUF files")


def open_safetensors(path: Path) -> Any:
    """`safe_open` with errors in one line. Raises BadCheckpoint if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as fault:
        if _is_pointer(path):
            raise BadCheckpoint(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`") from None
        raise BadCheckpoint(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or not safetensors: {fault}; get it again"
        ) from fault


def _is_pointer(path: Path) -> bool:
    """Whether git left its note of a large file in the file's place."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _single(source: Source) -> Checkpoint:
    path = source.path(SAFETENSORS)
    assert path is not None
    with open_safetensors(path) as handle:
        return Checkpoint(source, dict.fromkeys(handle.keys(), SAFETENSORS))


def _weight_map(source: Source, index: str) -> dict[str, str]:
    files = read_json(source.folder / index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()) or not files:
        raise BadCheckpoint(f"{source.folder / index} has no usable weight_map; expected tensor names and files")
    outside = next((file for file in files.values() if Path(file).is_absolute() or ".." in Path(file).parts), None)
    if outside is not None:
        raise BadCheckpoint(f"{source.folder / index} names {outside}, which is outside the model's folder")
    if source.repo is None:
        missing = sorted({file for file in files.values() if not (source.folder / file).exists()})
        if missing:
            raise BadCheckpoint(f"{source.folder / index} names {missing[0]}, which is not there; get it again")
    return files


def _legacy(source: Source, files: list[str]) -> Checkpoint:
    import torch

    tensors: dict[str, Tensor] = {}
    for file in files:
        path = source.path(file)
        if path is None:
            raise BadCheckpoint(f"{source.name}: {LEGACY_INDEX} names {file}, which is not there; get it again")
        try:
            # mapped where it is an archive, which files of torch before 1.6 are not
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as fault:
            raise BadCheckpoint(
                f"{path} ({path.stat().st_size:,} bytes) is cut short or holds more than tensors "
                f"({type(fault).__name__}); expected what torch.load(weights_only=True) reads"
            ) from fault
        if not isinstance(loaded, Mapping):
            raise BadCheckpoint(f"{path} holds a {type(loaded).__name__}; expected tensors by name")
        tensors |= {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    note = "a .bin checkpoint is opened whole, all of its files; save it as safetensors to read one layer at a time"
    return Checkpoint(source, dict.fromkeys(tensors, LEGACY), legacy=tensors, notes=[note])


def _slice(handle: Any, name: str, file: str) -> Any:
    from safetensors import SafetensorError

    try:
        return handle.get_slice(name)
    except SafetensorError as fault:
        raise BadCheckpoint(f"{file} does not hold {name}, which the index says it does; get it again") from fault
