"""The metadata of a GGUF file as checked values: right type, in range, in agreement with the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models.gguf_header import Header, TensorEntry

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
"""A decoder layer's tensor: its layer, and its name there with the ending `.weight` or `.bias`."""
LARGEST = 2**31
"""Above any count or width of a model; what is read from a damaged file must not be allocated."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """A header's keys of one architecture, `llama.block_count` being `count("block_count")`.

    Every getter raises BadCheckpoint where the key is absent and has no default, or its value cannot be meant.
    """

    header: Header
    architecture: str

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensors by GGUF's name."""
        return self.header.tensors

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on; of an array of equal ones, one a layer, that one."""
        value = self._value(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModel(
                f"{self.header.path}: {self._named(key)} differs from layer to layer; expected one number for all"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST:
            raise self._bad(key, value, "a whole number from 1 on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._bad(key, value, "a number above 0")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._bad(key, value, "a text")
        return value

    def has(self, key: str) -> bool:
        """Whether the file states the key."""
        return self._named(key) in self.header.metadata

    def window(self) -> int | None:
        """The sliding window of attention; None where none is stated, or 0, which stands for none."""
        return self.count("attention.sliding_window") if self._value("attention.sliding_window", 0) != 0 else None

    def token(self, name: str) -> int | None:
        """The id of a special token, `bos`, `eos` or `padding`; None where none is stated."""
        value = self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many dimensions."""
        entry = self.tensors.get(name)
        if entry is None:
            raise BadCheckpoint(f"{self.header.path} has no tensor {name}; it is incomplete")
        if len(entry.shape) != dimensions:
            raise BadCheckpoint(
                f"{self.header.path}: tensor {name} has shape {entry.shape}; expected {dimensions} dimensions"
            )
        return entry.shape

    def agree(self, key: str, stated: int, found: int, where: str) -> None:
        """Raise BadCheckpoint unless the metadata and a tensor's shape say the same."""
        if stated != found:
            raise BadCheckpoint(
                f"{self.header.path} states {self._named(key)} {stated:,}; {where} makes it {found:,}: it is damaged"
            )

    def layers(self) -> int:
        """How many decoder layers there are: as stated, each with tensors of its own."""
        stated = self.count("block_count")
        found = {int(match.group(1)) for match in map(BLOCK.fullmatch, self.tensors) if match}
        if stated > len(found) or found != set(range(stated)):
            ends = f"{min(found)} to {max(found)}" if found else "none"
            raise BadCheckpoint(
                f"{self.header.path} states {self._named('block_count')} {stated:,}; its tensors belong to "
                f"{len(found):,} layers ({ends}): it is incomplete or damaged"
            )
        return stated

    def _named(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _value(self, key: str, default: Any) -> Any:
        value = self.header.metadata.get(self._named(key), default)
        if value is None:
            raise BadCheckpoint(f"{self.header.path} does not state {self._named(key)}; it is incomplete")
        return value

    def _bad(self, key: str, value: Any, expected: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.header.path} states {self._named(key)} {value!r}; expected {expected}")
