"""Tensors of safetensors files on the Hub, of which only those bytes are fetched that are read.

As `safe_open`, a file gives the names of its tensors and slices of them. What was read is kept on the disk, each tensor
or run of rows as a safetensors file of its own, which safetensors itself then opens. The cache is below the assets of
huggingface_hub (`HF_ASSETS_CACHE`), is bounded, and may be used by several processes at once.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from mwtool.errors import BadCheckpoint, OutputError, line_of
from mwtool.files.atomic_write import write
from mwtool.models.hub_ranges import OnBytes, RemoteFile, read_range, remote_file

if TYPE_CHECKING:
    from torch import Tensor

LIMIT, PARTS = 64 * 10**9, 16
"""Bytes that the cache holds at most, beside the tensor read last; those unused for longest are removed,
until a part of it is free."""
WRITING = 600
"""Seconds after which a part that does not grow is one that was left behind."""
FIRST = 2**16
"""Bytes that are fetched first of a file: enough for most headers."""
LONGEST = 10**8
"""Bytes of the longest header that safetensors reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTensors:
    """A safetensors file on the Hub, by its header. header: name -> dtype, shape and data_offsets, as stored.

    begin: where the tensors begin in the file. folder: where what is read of them is kept.
    """

    remote: RemoteFile
    header: dict[str, dict[str, Any]]
    begin: int
    folder: Path

    def __enter__(self) -> Self:
        """As `safe_open`; there is nothing to close."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: every read opens and closes its own file."""

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self.header)

    def get_slice(self, name: str) -> RemoteSlice:
        """A tensor, not read yet. Raises BadCheckpoint where there is none of this name."""
        if name not in self.header:
            raise BadCheckpoint(f"{self.remote.file} does not hold {name}, which the index says it does; get it again")
        return RemoteSlice(self, name)


@dataclass(frozen=True, slots=True)
class RemoteSlice:
    """A tensor on the Hub, as the slices of safetensors: `[...]` reads it whole and `[i:j]` these rows."""

    file: RemoteTensors
    name: str

    def get_shape(self) -> list[int]:
        """As of safetensors' slices."""
        return list(self.file.header[self.name]["shape"])

    def get_dtype(self) -> str:
        """As of safetensors' slices."""
        return str(self.file.header[self.name]["dtype"])

    def __getitem__(self, index: Any) -> Tensor:
        shape = self.get_shape()
        if isinstance(index, slice) and shape and index.step in (None, 1):
            first, last, _ = index.indices(shape[0])
            if (first, last) != (0, shape[0]):
                return self._read(first, max(first, last))
            return self._read(None, None)
        whole = self._read(None, None)
        return whole if index is Ellipsis else whole[index]

    def pieces(self, rows: Sequence[int] | None = None) -> list[Piece]:
        """The tensor, or each of these rows, to be had in the cache."""
        return [Piece(self)] if rows is None else [Piece(self, row) for row in rows]

    def path(self, first: int | None, last: int | None) -> Path:
        """Where these rows are kept, or all of the tensor."""
        key = self.name if first is None else f"{self.name}\0{first}\0{last}"
        return self.file.folder / f"{sha256(key.encode(errors='surrogatepass')).hexdigest()[:32]}.safetensors"

    def _read(self, first: int | None, last: int | None) -> Tensor:
        from safetensors import SafetensorError, safe_open

        for _ in range(3):  # another process may remove it before it is open
            path = self.cached(first, last)
            try:
                with safe_open(path, framework="pt") as handle:
                    tensor: Tensor = handle.get_tensor(self.name)
                    return tensor
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError) as fault:
                path.unlink(missing_ok=True)
                raise BadCheckpoint(f"{self.name} in {self.file.remote.name} is damaged: {line_of(fault)}") from fault
        raise OutputError(f"{path} is removed as soon as it is written; clear {self.file.folder}, or use another disk")

    def cached(self, first: int | None, last: int | None, on_bytes: OnBytes | None = None) -> Path:
        """The file that holds these rows, or all of the tensor, fetched if need be. Raises what `read_range` raises."""
        from filelock import FileLock

        path = self.path(first, last)
        with suppress(FileNotFoundError):
            os.utime(path)  # used last
            return path
        try:
            # of two processes or threads, one fetches and the other waits; one of 256 locks, as they are never removed
            with FileLock(self.file.folder / f"{path.name[:2]}.lock"):
                if not path.exists():
                    self._fetch(path, first, last, on_bytes)
                    _keep_within(self.file.folder.parent.parent.parent, path)
        except OSError as fault:
            raise OutputError(f"{path} cannot be written: {fault.strerror}; make room, or move HF_HOME") from fault
        return path

    def _fetch(self, path: Path, first: int | None, last: int | None, on_bytes: OnBytes | None) -> None:
        """Fetch into a file beside it, going on where an interrupted run left off, and rename that."""
        entry, shape = self.file.header[self.name], self.get_shape()
        start, end = entry["data_offsets"]
        if first is not None and last is not None:
            row = (end - start) // shape[0]
            start, end, shape = start + first * row, start + last * row, [last - first, *shape[1:]]
        described = {self.name: {"dtype": entry["dtype"], "shape": shape, "data_offsets": [0, end - start]}}
        text = json.dumps(described).encode()
        opening = struct.pack("<Q", len(text)) + text
        part = path.with_suffix(".part")
        with part.open("ab") as out:
            if not len(opening) <= out.tell() <= len(opening) + end - start:
                out.truncate(0)
                out.seek(0)
                out.write(opening)
                out.flush()
            done = out.tell() - len(opening)
            if on_bytes is not None and done:
                on_bytes(done)
            read_range(self.file.remote, self.file.begin + start + done, self.file.begin + end, out, on_bytes)
        part.replace(path)


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on the Hub, or one of its rows, that is to be in the cache."""

    tensor: RemoteSlice
    row: int | None = None

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.tensor.path(self.row, None if self.row is None else self.row + 1)

    @property
    def size(self) -> int:
        """In bytes."""
        start, end = self.tensor.file.header[self.tensor.name]["data_offsets"]
        return int(end - start) if self.row is None else int(end - start) // self.tensor.get_shape()[0]

    def fetch(self, on_bytes: OnBytes) -> None:
        """Have it there. What is there already is counted as arrived. Raises what `read_range` raises."""
        arrived = 0

        def count(more: int) -> None:
            nonlocal arrived
            arrived += more
            on_bytes(more)

        self.tensor.cached(self.row, None if self.row is None else self.row + 1, count)
        on_bytes(self.size - arrived)


def open_remote(repo: str, file: str, revision: str) -> RemoteTensors | None:
    """Read the header of a safetensors file on the Hub; None if the repository does not have the file.

    Raises BadCheckpoint where it is not safetensors, NoRanges where the server gives no parts of files, and
    ModelNotFound where the Hub refuses.
    """
    from huggingface_hub import cached_assets_path, constants

    name = sha256(file.encode()).hexdigest()[:32]
    try:
        place = cached_assets_path("mwtool", repo, revision, assets_dir=constants.HF_ASSETS_CACHE) / name
        place.mkdir(exist_ok=True)
    except (OSError, ValueError) as fault:
        raise OutputError(f"{constants.HF_ASSETS_CACHE} cannot be written: {line_of(fault)}; move HF_HOME") from fault
    about = place / "about.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # else it is asked for
        known = json.loads(about.read_text(encoding="utf-8"))
        remote = RemoteFile(repo=repo, file=file, revision=revision, etag=known["etag"], size=known["size"])
        return RemoteTensors(remote=remote, header=known["header"], begin=known["begin"], folder=place)
    found = remote_file(repo, file, revision)
    if found is None:
        return None
    header, begin = _header(found)
    write(about, json.dumps({"etag": found.etag, "size": found.size, "begin": begin, "header": header}))
    return RemoteTensors(remote=found, header=header, begin=begin, folder=place)


def _header(remote: RemoteFile) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file without its metadata, and where it ends."""
    read = BytesIO()
    read_range(remote, 0, min(FIRST, remote.size), read)
    length = int.from_bytes(read.getvalue()[:8], "little")
    begin = 8 + length
    if remote.size < begin or length > LONGEST:
        raise BadCheckpoint(f"{remote.name} ({remote.size:,} bytes) is cut short or not safetensors; get it again")
    if begin > FIRST:
        read_range(remote, FIRST, begin, read)
    try:
        header = json.loads(read.getvalue()[8:begin])
        header.pop("__metadata__", None)
        ends = [_end(entry) for entry in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise BadCheckpoint(
            f"{remote.name} has no usable safetensors header ({line_of(fault)}); get it again"
        ) from fault
    if max(ends, default=0) != remote.size - begin:
        raise BadCheckpoint(
            f"{remote.name} ({remote.size:,} bytes) is cut short: its header describes {begin + max(ends, default=0):,}"
        )
    return header, begin


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor ends. Raises ValueError where its entry cannot be meant."""
    start, end = entry["data_offsets"]
    numbers = [start, end, *entry["shape"]]
    if not all(isinstance(one, int) and one >= 0 for one in numbers) or not isinstance(entry["dtype"], str):
        raise ValueError(f"an entry is {str(entry)[:80]}")
    if end < start or (prod(entry["shape"]) == 0) != (end == start):
        raise ValueError(f"an entry is {str(entry)[:80]}")
    if entry["shape"] and end > start and (end - start) % entry["shape"][0]:
        raise ValueError(f"an entry is {str(entry)[:80]}")
    return int(end)


def _keep_within(root: Path, last: Path) -> None:
    """Have the cache stay within `LIMIT` after `last` was added to it; `last` stays.

    The cache is walked only where it may be full by what this process knows, and each time that this process has added
    a part of the limit: other processes add to it, too.
    """
    with _counting:
        counted = _counted.get(root)
        if counted is not None:
            held, added = counted[0], counted[1] + last.stat().st_size
            if held + added <= LIMIT and added <= LIMIT // PARTS:
                _counted[root] = (held, added)
                return
        _counted[root] = (_cleared(root, last), 0)


_counting = Lock()
_counted: dict[Path, tuple[int, int]] = {}
"""Bytes in a cache when it was walked last, and those that this process has added since."""


def _cleared(root: Path, last: Path) -> int:
    """What a cache holds, after the files used longest ago are removed if that is too much."""
    found = []
    for path in root.rglob("*"):
        with suppress(OSError):
            if path.suffix in (".safetensors", ".part") and path != last:
                state = path.stat()
                if path.suffix == ".part" and state.st_mtime > time.time() - WRITING:
                    continue  # being written
                found.append((state.st_mtime, state.st_size, path))
    total = last.stat().st_size + sum(size for _, size, _ in found)
    if total <= LIMIT:
        return total
    for _, size, path in sorted(found):
        if total <= LIMIT - LIMIT // PARTS:  # some room, else each addition would have it walked again
            break
        with suppress(OSError):  # in use on Windows, or removed by another process
            path.unlink()
            total -= size
    return total
