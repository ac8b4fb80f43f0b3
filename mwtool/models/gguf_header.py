"""The header of a GGUF file: its metadata and its table of tensors, without the tensors.

The format is described in docs/gguf.md of ggml. Vocabularies are passed over, not read: of an
array of strings only its place and length are kept, so that opening a file with 262,144 tokens
takes a tenth of a second. Every count and length is checked against the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mwtool.errors import BadCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LFS_POINTER = b"version https://git-lfs"
ALIGNMENT = 32
"""Of the tensors' data, where the metadata states none."""
MAX_DIMENSIONS = 4
MOST = {"tensors": 100_000, "metadata entries": 100_000}
MOST_ENTRIES = 10_000_000
"""Of an array. Ten times what models have that are released, so that no file takes seconds or gigabytes to refuse."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_LEAST_PAIR, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that a metadata entry and a tensor's entry take at least."""

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class StringArray:
    """Where an array of strings lies: its first entry's offset in the file, and how many entries it has."""

    offset: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the table.

    shape: as torch has it, the contiguous dimension last. offset: of its first byte in `file`; nbytes: of its data.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    block_type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself.

    metadata: key -> number, text, list of numbers, or the place of an array of strings.
    tensors: by name, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Scalar | list[Scalar] | StringArray]
    tensors: Mapping[str, TensorEntry]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does, or is at least called one."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Parse the metadata and the tensor table of a GGUF file.

    Raises BadCheckpoint where the file is not a GGUF file, is truncated or contradicts itself, UnsupportedModel for
    a version, byte order or block type that cannot be read, or where the package `gguf` is not installed.
    """
    require_gguf()
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise BadCheckpoint(f"{path} is empty; expected a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).header()
    except OSError as fault:
        raise BadCheckpoint(f"{path} cannot be read: {fault.strerror or fault}") from fault


def read_strings(path: Path, array: StringArray, index: int) -> str:
    """One string of an array of them, found by walking past those before it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parser = _Parser(path, data, array.offset)
        for _ in range(index):
            parser.skip_string()
        return parser.string("the entry of an array of strings")


def require_gguf() -> None:
    """Raise UnsupportedModel, saying what to install, where the package `gguf` is missing."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise UnsupportedModel("reading GGUF needs the package gguf; install it with: pip install 'mwtool[gguf]'")


class _Parser:
    """A position in a mapped file, and what is read from there on."""

    def __init__(self, path: Path, data: mmap.mmap, at: int = 0) -> None:
        self.path, self.data, self.at, self.size = path, data, at, len(data)

    def header(self) -> Header:
        tensor_count, pair_count = self._counts()
        metadata: dict[str, Scalar | list[Scalar] | StringArray] = {}
        for _ in range(pair_count):
            key = self.string("a metadata key")
            if key in metadata:
                raise BadCheckpoint(f"{self.path} states {key} twice; it is damaged")
            metadata[key] = self._value(key, self._number("<I", f"the type of {key}"))
        rows = [self._tensor_row() for _ in range(tensor_count)]
        return Header(self.path, metadata, self._placed(rows, metadata.get("general.alignment", ALIGNMENT)))

    def _counts(self) -> tuple[int, int]:
        """The file's numbers of tensors and of metadata entries."""
        found = self.data[: len(MAGIC)]
        if found != MAGIC:
            if found == LFS_POINTER[: len(MAGIC)]:
                raise BadCheckpoint(f"{self.path} is a Git LFS pointer, not the weights; run `git lfs pull`")
            raise BadCheckpoint(f"{self.path} begins with {found!r}; expected {MAGIC!r}, as every GGUF file does")
        self.at = len(MAGIC)
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedModel(f"{self.path} is a big-endian GGUF file; expected little-endian: convert it")
            raise UnsupportedModel(
                f"{self.path} has GGUF version {version}; expected 2 or 3: convert it with a current llama.cpp"
            )
        tensor_count, pair_count = self._number("<Q", "the tensor count"), self._number("<Q", "the metadata count")
        for count, least, what in (
            (pair_count, _LEAST_PAIR, "metadata entries"),
            (tensor_count, _LEAST_TENSOR, "tensors"),
        ):
            self._check_room(count, least, what)
            self._check_most(count, MOST[what], what)
        return tensor_count, pair_count

    def _check_room(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise BadCheckpoint(
                f"{self.path} announces {count:,} {what}, which do not fit into its {self.size:,} bytes; "
                f"it is truncated or damaged: get it again"
            )

    def _check_most(self, count: int, most: int, what: str) -> None:
        if count > most:
            raise BadCheckpoint(f"{self.path} announces {count:,} {what}; expected {most:,} at most: it is no model's")

    def _number(self, code: str, what: str) -> int:
        width = struct.calcsize(code)
        if self.at + width > self.size:
            raise BadCheckpoint(f"{self.path} ends within {what}, at byte {self.size:,}; it is truncated: get it again")
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += width
        return value  # type: ignore[no-any-return] # struct is untyped; floats and booleans pass as well

    def _scalar(self, kind: int, key: str) -> Scalar:
        value: Scalar = self._number(_SCALARS[kind], key)
        if (
            kind == _FLOAT32
        ):  # the shortest decimal with this float32: 1e-05, as config.json says, not 9.99999974737e-06
            value = float(str(np.float32(value)))
        return value

    def skip_string(self) -> None:
        length = self._number("<Q", "a string")
        self._check_room(length, 1, "bytes of a string")
        self.at += length

    def string(self, what: str) -> str:
        begin = self.at + 8
        self.skip_string()
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError:
            raise BadCheckpoint(f"{self.path}: {what} at byte {begin:,} is not UTF-8; the file is damaged") from None

    def _value(self, key: str, kind: int) -> Scalar | list[Scalar] | StringArray:
        if kind in _SCALARS:
            return self._scalar(kind, key)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise BadCheckpoint(f"{self.path}: {key} has value type {kind}; expected 0 to 12: the file is damaged")
        of, count = self._number("<I", key), self._number("<Q", key)
        if of == _STRING:
            self._check_room(count, 8, f"strings in {key}")
            self._check_most(count, MOST_ENTRIES, f"strings in {key}")
            begin = self.at
            for _ in range(count):
                self.skip_string()
            return StringArray(begin, count)
        if of not in _SCALARS:
            raise UnsupportedModel(
                f"{self.path}: {key} is an array of values of type {of}; expected numbers or strings"
            )
        code = _SCALARS[of]
        self._check_room(count, struct.calcsize(code), f"numbers in {key}")
        self._check_most(count, MOST_ENTRIES, f"numbers in {key}")
        values = list(struct.unpack_from(f"<{count}{code[1:]}", self.data, self.at))
        self.at += count * struct.calcsize(code)
        return values

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape as torch has it, number of the block type, offset within the data section."""
        name = self.string("a tensor's name")
        count = self._number("<I", f"the shape of {name}")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise BadCheckpoint(f"{self.path}: tensor {name} has {count} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number("<Q", f"the shape of {name}") for _ in range(count))[::-1]
        if not all(shape):
            raise BadCheckpoint(f"{self.path}: tensor {name} has shape {shape}, which is empty; the file is damaged")
        return name, shape, self._number("<I", f"the type of {name}"), self._number("<Q", f"the offset of {name}")

    def _placed(self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: object) -> dict[str, TensorEntry]:
        """The table with every tensor's place in the file; they follow one another, aligned, as ggml requires."""
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or alignment < 1
            or alignment & (alignment - 1)
        ):
            raise BadCheckpoint(f"{self.path} states general.alignment {alignment!r}; expected a power of two")
        start, expected = _aligned(self.at, alignment), 0
        placed: dict[str, TensorEntry] = {}
        for name, shape, number, offset in rows:
            block_type, nbytes = self._sized(name, shape, number)
            if name in placed:
                raise BadCheckpoint(f"{self.path} holds two tensors named {name}; it is damaged")
            if offset != expected:
                raise BadCheckpoint(
                    f"{self.path}: tensor {name} begins at byte {offset:,} of the data; expected {expected:,}, "
                    f"behind the tensor before it: the file is damaged"
                )
            if start + offset + nbytes > self.size:
                raise BadCheckpoint(
                    f"{self.path} has {self.size:,} bytes; its tensor {name} ends at byte {start + offset + nbytes:,}: "
                    f"the file is truncated, get it again"
                )
            placed[name] = TensorEntry(
                file=self.path, name=name, shape=shape, block_type=block_type, offset=start + offset, nbytes=nbytes
            )
            expected = _aligned(offset + nbytes, alignment)
        return placed

    def _sized(self, name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
        """The block type behind a number, and how many bytes a tensor of it takes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block_type = GGMLQuantizationType(number)
        except ValueError:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} is stored as block type {number}, which this version of the package "
                f"gguf does not know; try: pip install -U gguf"
            ) from None
        width, nbytes = GGML_QUANT_SIZES[block_type]
        if shape[-1] % width:
            raise BadCheckpoint(
                f"{self.path}: tensor {name} has rows of {shape[-1]}; {block_type.name} needs a multiple of {width}"
            )
        return block_type, math.prod(shape) // width * nbytes


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
