"""A checkpoint's tensors by name, read in place: safetensors, one file or sharded, GGUF, or legacy ``.bin``.

Tensors are memory-mapped. A file is opened anew for every read and closed after it, so
that the pages of a layer leave memory together with its tensors.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from mwtool.errors import BadCheckpoint, UnsupportedModel, line_of
from mwtool.files.text import shown
from mwtool.models.gguf_checkpoint import lazy_tensors
from mwtool.models.gguf_header import LFS_POINTER
from mwtool.models.hub_ranges import NoRanges
from mwtool.models.load_options import Download
from mwtool.models.remote_tensors import RemoteTensors, open_remote
from mwtool.models.source import Source
from mwtool.models.weight_files import (
    LEGACY,
    LEGACY_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    WeightFiles,
    check_count,
    find_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = "a .bin checkpoint is opened whole, all of its files; save it as safetensors to read one layer at a time"
"""A note for scans, which otherwise have one layer in memory at a time."""


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """Tensor name -> file, and the tensors themselves on request.

    files: which file holds which tensor. shards: all weight files, those without a tensor of `files` included.
    index: the name of the index that decides; None for a single file.
    lost: names that the index gives to a file which does not hold them.
    legacy: tensors of ``.bin`` files, which can only be opened whole; None for safetensors.
    as_transformers: whether `from_pretrained` would read the same tensors from the same files.
    """

    source: Source
    files: dict[str, str]
    shards: tuple[str, ...]
    index: str | None = None
    lost: dict[str, str] = field(default_factory=dict)
    legacy: dict[str, Tensor] | None = None
    as_transformers: bool = True
    notes: list[str] = field(default_factory=list)
    _remote: dict[str, RemoteTensors] = field(default_factory=dict)

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

    @contextmanager
    def whole(self) -> Iterator[dict[str, Any]]:
        """As `tensors`, all of them; names of the index that no file has are left out. A Hub's files are fetched."""
        if self.legacy is not None or self.source.repo is None or self.source.gguf is not None:
            with self.tensors(self.files) as tensors:
                yield tensors
            return
        with ExitStack() as stack:
            opened = {file: stack.enter_context(self._open(file)) for file in self.shards}
            held = {file: set(handle.keys()) for file, handle in opened.items()}
            self.lost = {name: file for name, file in self.files.items() if name not in held[file]}
            self.note_copies(held)
            yield {name: _slice(opened[file], name, file) for name, file in self.files.items() if name in held[file]}

    def stored_name(self, name: str) -> str:
        """What the file itself calls a tensor: GGUF has names of its own."""
        return name if self.source.gguf is None else self.source.gguf.conversion.tensors[name].tensor

    def _open(self, file: str) -> Any:
        if file in self._remote:
            return self._remote[file]
        handle = _opened(self.source, file, self.source.download)
        if handle is None:
            raise BadCheckpoint(f"{self.source.name}: {self.index} names {file}, which is not there; get it again")
        if isinstance(handle, RemoteTensors):
            self._remote[file] = handle
        return handle

    def look_inside(self) -> None:
        """Leave out names of the index that no file has; note tensors that lie in a second file too."""
        held: dict[str, set[str]] = {}
        for file in self.shards:
            with suppress(BadCheckpoint), self._open(file) as handle:  # said when it is needed
                held[file] = set(handle.keys())
        self.lost = {name: file for name, file in self.files.items() if file in held and name not in held[file]}
        self.files = {name: file for name, file in self.files.items() if name not in self.lost}
        self.note_copies(held)

    def note_copies(self, held: Mapping[str, set[str]]) -> None:
        """Note tensors that lie in a second file, which the index does not name for them. held: names by file."""
        copies = [(name, file) for file in sorted(held) for name in held[file] if self.files.get(name, file) != file]
        if copies:
            name, file = min(copies)
            more = f", and {len(copies) - 1} more tensors likewise" if len(copies) > 1 else ""
            note = f"{name} is stored in {self.files[name]} and in {file}{more}; {self.index} decides for the first"
            self.notes = list(dict.fromkeys((*self.notes, note)))
            self.as_transformers = False


def open_checkpoint(source: Source) -> Checkpoint:
    """Find a model's weight files; `find_weights` says in which order.

    Raises BadCheckpoint if there are none, the index is damaged or a file cannot be read.
    """
    if source.gguf is not None:
        if source.download == "ranges" and source.repo is not None:
            raise UnsupportedModel(f"{source.name} is a GGUF file, which is fetched whole; leave out --download ranges")
        entries = source.gguf.header.tensors
        files = {name: entries[one.tensor].file.name for name, one in source.gguf.conversion.tensors.items()}
        return Checkpoint(source=source, files=files, shards=tuple(sorted(set(files.values()))))
    found = find_weights(source)
    if found is None:
        expected = f"expected {SAFETENSORS}, {SAFETENSORS_INDEX}, {LEGACY} or {LEGACY_INDEX}"
        raise BadCheckpoint(f"{source.name} has no weights; {expected}, or --gguf-file NAME for one of its GGUF files")
    if found.legacy:
        return _legacy(source, found)
    if found.weight_map is None:
        return _single(source, found)
    checkpoint = Checkpoint(
        source=source,
        files=found.weight_map,
        shards=found.shards,
        index=found.index,
        as_transformers=found.metadata,
        notes=list(found.notes),
    )
    if source.repo is None:  # a Hub's files are fetched when they are first read
        checkpoint.look_inside()
    return checkpoint


def _opened(source: Source, file: str, download: Download) -> Any:
    """A safetensors file, to be read in place or from the Hub by ranges; None where there is no such file."""
    if download != "whole" and source.repo is not None and not (source.folder / file).exists():
        assert source.revision is not None
        try:
            return open_remote(source.repo, file, source.revision)
        except NoRanges:
            if download == "ranges":
                raise
    path = source.path(file)
    return None if path is None else open_safetensors(path)


def open_safetensors(path: Path) -> Any:
    """`safe_open` with errors in one line. Raises BadCheckpoint if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as fault:
        if _is_pointer(path):
            raise BadCheckpoint(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`") from None
        raise BadCheckpoint(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or not safetensors: {line_of(fault)}; get it again"
        ) from fault


def _is_pointer(path: Path) -> bool:
    """Whether git left its note of a large file in the file's place."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _single(source: Source, found: WeightFiles) -> Checkpoint:
    (file,) = found.shards
    handle = _opened(source, file, source.download)
    if handle is None:
        raise BadCheckpoint(f"{source.name} has no {file}; get it again")
    with handle:
        files = dict.fromkeys(handle.keys(), file)
    check_count(file, len(files))
    return Checkpoint(source=source, files=files, shards=found.shards, notes=list(found.notes))


def _legacy(source: Source, found: WeightFiles) -> Checkpoint:
    import torch

    if source.download == "ranges" and source.repo is not None:
        raise UnsupportedModel(f"{source.name} has .bin files, which are read whole; leave out --download ranges")
    held: dict[str, Mapping[str, Any]] = {}
    for file in found.shards:
        path = source.path(file)
        if path is None:
            raise BadCheckpoint(f"{source.name}: {found.index} names {file}, which is not there; get it again")
        held[file] = _unpickled(path)
    files = found.weight_map or {name: file for file in held for name in held[file] if isinstance(name, str)}
    tensors = {name: held[file][name] for name, file in files.items() if isinstance(held[file].get(name), torch.Tensor)}
    if not tensors:
        keys = ", ".join(shown(key) for content in held.values() for key in list(content)[:5]) or "nothing"
        raise BadCheckpoint(
            f"{source.name}: {found.shards[0]} has no tensors by name but {keys}; expected a state dict"
        )
    checkpoint = Checkpoint(
        source=source,
        files={name: files[name] for name in tensors},
        lost={name: file for name, file in files.items() if name not in held[file]},
        shards=found.shards,
        index=found.index,
        legacy=tensors,
        notes=[*found.notes, WHOLE],
    )
    if found.index is not None:
        checkpoint.note_copies(
            {file: {name for name in content if isinstance(name, str)} for file, content in held.items()}
        )
    return checkpoint


def _unpickled(path: Path) -> Mapping[str, Any]:
    """What a ``.bin`` file holds, without running any code of its own."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            # mapped where it is an archive, which files of torch before 1.6 are not
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except UNREADABLE as fault:
        raise BadCheckpoint(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or holds more than tensors "
            f"({type(fault).__name__}); expected what torch.load(weights_only=True) reads"
        ) from fault
    if not isinstance(loaded, Mapping):
        raise BadCheckpoint(f"{path} holds a {type(loaded).__name__}; expected tensors by name")
    return loaded


UNREADABLE: tuple[type[Exception], ...] = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, ImportError, MemoryError, struct.error),
)
"""What `torch.load(weights_only=True)` raises over files that are damaged, or that are no tensors at all."""


def _slice(handle: Any, name: str, file: str) -> Any:
    from safetensors import SafetensorError

    try:
        return handle.get_slice(name)
    except SafetensorError as fault:
        raise BadCheckpoint(f"{file} does not hold {name}, which the index says it does; get it again") from fault
