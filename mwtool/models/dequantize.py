"""Packed checkpoints read as plain ones: a weight stored in several tensors has one name, and is dequantized when read.

What a format stores, and how it is undone, is said in `packed_formats`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.errors import BadCheckpoint
from mwtool.models.checkpoint import Checkpoint
from mwtool.models.key_mapping import pieces
from mwtool.models.packed_formats import Format, Packed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mwtool.models.remote_tensors import Piece


class DequantizedWeight:
    """A lazy weight, dequantized whole when some of it is read. As of safetensors' slices."""

    def __init__(self, packed: Packed, parts: Mapping[str, Any], *, transposed: bool) -> None:
        self.packed, self.parts, self.transposed = packed, parts, transposed

    def __getitem__(self, index: Any) -> Tensor:
        weight = self.packed.weight()
        return (weight.T if self.transposed else weight)[index]

    def pieces(self, rows: Sequence[int] | None = None) -> list[Piece]:
        """Those of all parts: rows are not packed one by one."""
        del rows
        return [piece for part in self.parts.values() for piece in pieces(part)]

    def get_shape(self) -> list[int]:
        """Of the weight, not of what is stored."""
        shape = self.packed.shape()
        return shape[::-1] if self.transposed else shape

    def get_dtype(self) -> str:
        """A plain one, whatever is stored: there is nothing left to be scaled."""
        return "F32"


@dataclass(slots=True, kw_only=True)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint under the names its weights would have if they were not packed.

    stored: what is read. packed: name of a weight -> what its format calls a part -> the tensor that holds it.
    transposed: weights whose module expects (in, out), while formats store (out, in).
    """

    stored: Checkpoint
    format: Format
    packed: dict[str, dict[str, str]]
    transposed: frozenset[str] = frozenset()

    @contextmanager
    def tensors(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """As of `Checkpoint`; what is read of a packed weight is dequantized."""
        names = list(names)
        parts = {name: self.packed.get(name, {"": name}) for name in names}
        with self.stored.tensors(dict.fromkeys(tensor for one in parts.values() for tensor in one.values())) as stored:
            yield {
                name: self._lazy(name, {part: stored[tensor] for part, tensor in parts[name].items()}) for name in names
            }

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor that holds a weight's packed numbers."""
        return self.packed.get(name, {self.format.marks[0]: name})[self.format.holds]

    def transpose_for(self, model: nn.Module, names: dict[str, list[str]]) -> None:
        """Note which weights belong to a `Conv1D`, as GPT-2 has. names: parameter -> its tensors in the checkpoint."""
        from transformers.pytorch_utils import Conv1D

        modules = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
        found = {name for path in modules for name in names.get(f"{path}.weight", [])}
        self.transposed = frozenset(found & self.packed.keys())

    def _lazy(self, name: str, parts: dict[str, Any]) -> Any:
        if name not in self.packed:
            return parts[""]
        return DequantizedWeight(self.format.open(name, parts), parts, transposed=name in self.transposed)


def dequantized(stored: Checkpoint, form: Format) -> DequantizedCheckpoint:
    """The checkpoint with each packed weight under one name.

    Raises BadCheckpoint if no weight is packed, or a part of one is absent.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in stored.files:
        for part in form.parts:
            if name.endswith(f".{part}"):
                modules[name.removesuffix(f".{part}")][part] = name
    packed = {path: parts for path, parts in modules.items() if any(mark in parts for mark in form.marks)}
    if not packed:
        raise BadCheckpoint(
            f"config.json of {stored.source.name} says {form.method}, and no tensor is packed so; expected names that "
            f"end with .{' or .'.join(form.marks)}"
        )
    for path, parts in packed.items():
        for part in form.needed:
            if part not in parts:
                raise BadCheckpoint(f"{path} of {stored.source.name} is packed and has no {path}.{part}; get it again")
    hidden = {name for parts in packed.values() for name in parts.values()}
    files = {name: file for name, file in stored.files.items() if name not in hidden}
    files |= {f"{path}.weight": stored.files[parts[form.holds]] for path, parts in packed.items()}
    return DequantizedCheckpoint(
        source=stored.source,
        files=files,
        shards=stored.shards,
        index=stored.index,
        lost=stored.lost,
        legacy=stored.legacy,
        as_transformers=False,
        notes=stored.notes,
        stored=stored,
        format=form,
        packed={f"{path}.weight": parts for path, parts in packed.items()},
    )
