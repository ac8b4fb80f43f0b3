"""Which files hold a model's weights, and which of them holds which tensor: decided here, once, for every command.

`config.json` may name the file (`transformers_weights`); else the order is that of `from_pretrained`: safetensors
before ``.bin``, one file before an index. An index that names the single file as one of its shards comes first. Where
there is an index, it alone decides which shard a tensor is read from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from mwtool.errors import BadCheckpoint
from mwtool.files.text import link_fault, read_json, shown
from mwtool.models.hub import holds

if TYPE_CHECKING:
    from mwtool.models.source import Source

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MOST_TENSORS = 500_000
"""Names in a checkpoint: twice what the largest mixtures of experts have; 5 s of processor time and 0.6 GB."""
LONGEST_INDEX = 10**8
"""Bytes of an index, as of a header of safetensors."""
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, LEGACY, LEGACY_INDEX)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files of a checkpoint, whose contents have not been looked at.

    shards: file names, relative to the model's folder, sorted. weight_map: tensor name -> shard, as the index says;
    None for a single file. index: the name of the index; None for a single file. legacy: whether they are pickles
    (``.bin``) and not safetensors. metadata: whether the index has the `metadata` that transformers insists on.
    """

    shards: tuple[str, ...]
    weight_map: dict[str, str] | None = None
    index: str | None = None
    legacy: bool = False
    metadata: bool = True
    notes: tuple[str, ...] = ()


def find_weights(source: Source) -> WeightFiles | None:
    """The weight files of a model; None where it has none.

    Files of a Hub repository that are not in the cache are asked for by name and not fetched. Raises BadCheckpoint for
    an index that cannot be used, and for links that lead nowhere; ModelNotFound where the Hub fails.
    """
    named = _named_in_config(source)
    if named is not None:
        return named
    has_index, has_single = present(source.folder, SAFETENSORS_INDEX), present(source.folder, SAFETENSORS)
    if has_index:
        indexed = _indexed(source, SAFETENSORS_INDEX)
        if not has_single or SAFETENSORS in indexed.shards:
            return indexed
    if has_single or _on_hub(source, SAFETENSORS, unless=has_index):
        return WeightFiles(shards=(SAFETENSORS,), notes=_both(source, SAFETENSORS, SAFETENSORS_INDEX, there=has_index))
    has_index = present(source.folder, LEGACY_INDEX)
    if present(source.folder, LEGACY) or _on_hub(source, LEGACY, unless=has_index):
        return WeightFiles(shards=(LEGACY,), legacy=True, notes=_both(source, LEGACY, LEGACY_INDEX, there=has_index))
    return _indexed(source, LEGACY_INDEX, legacy=True) if has_index else None


def check_count(name: str, tensors: int) -> None:
    """Raise BadCheckpoint for more tensors than a model can have."""
    if tensors > MOST_TENSORS:
        raise BadCheckpoint(f"{name} names {tensors:,} tensors; expected {MOST_TENSORS:,} at most: it is no model's")


def present(folder: Path, name: str) -> bool:
    """Whether a folder has this file. Raises BadCheckpoint for a link that leads nowhere, and for a folder."""
    path = folder / name
    fault = link_fault(path)
    if fault is not None:
        raise BadCheckpoint(f"{fault}; get the file again, or point the link at it")
    if path.is_dir():
        raise BadCheckpoint(f"{path} is a folder; expected a file")
    return path.exists()


def _on_hub(source: Source, name: str, *, unless: bool) -> bool:
    return not unless and source.repo is not None and holds(source.repo, name, source.revision)


def _both(source: Source, single: str, index: str, *, there: bool) -> tuple[str, ...]:
    return (f"{source.name} has both {single} and {index}; {single} is read, as transformers does",) if there else ()


def _named_in_config(source: Source) -> WeightFiles | None:
    """The file that config.json names as the one with the weights, as transformers understands it."""
    if not present(source.folder, "config.json"):
        return None
    stated = read_json(source.folder / "config.json").get("transformers_weights")
    if stated is None:
        return None
    where = f"transformers_weights in {source.folder / 'config.json'}"
    if not isinstance(stated, str) or not stated.endswith((".safetensors", ".safetensors.index.json")):
        raise BadCheckpoint(f"{where} is {shown(stated)}; expected the name of a safetensors file or of its index")
    fault = _name_fault(stated) or (_absent(source.folder, stated) if source.repo is None else None)
    if fault is not None:
        raise BadCheckpoint(f"{where} is {shown(stated)}, which {fault}")
    return _indexed(source, stated) if stated.endswith(".json") else WeightFiles(shards=(stated,))


def _indexed(source: Source, index: str, *, legacy: bool = False) -> WeightFiles:
    path = source.folder / index
    if path.is_file() and path.stat().st_size > LONGEST_INDEX:
        raise BadCheckpoint(
            f"{path} has {path.stat().st_size:,} bytes; expected {LONGEST_INDEX:,} at most: it is no index of a model's"
        )
    content = read_json(path)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise BadCheckpoint(f"{path} has no usable weight_map; expected tensor names and files")
    check_count(str(path), len(files))
    beside = Path(index).parent  # shards lie where their index does
    weight_map = files if beside == Path() else {name: str(beside / file) for name, file in files.items()}
    shards = tuple(sorted(set(weight_map.values())))
    for shard in shards:
        fault = _name_fault(shard) or (_absent(source.folder, shard) if source.repo is None else None)
        if fault is not None:
            raise BadCheckpoint(f"{path} names {shown(shard)}, which {fault}")
    return WeightFiles(
        shards=shards,
        weight_map=weight_map,
        index=index,
        legacy=legacy,
        metadata=isinstance(content.get("metadata"), dict),
    )


def _name_fault(file: str) -> str | None:
    """Why a name from an index cannot be that of a file of the model."""
    path = Path(file)
    if path.is_absolute() or PureWindowsPath(file).drive or ".." in path.parts or "\\" in file:
        return "is outside the model's folder"
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return "is no file name"
    return "is no file name" if "\0" in file or path == Path() else None


def _absent(folder: Path, file: str) -> str | None:
    """Why a file of a local folder cannot be opened."""
    path = folder / file
    try:
        fault = link_fault(path)
        if fault is not None:
            return f"is a link to {path.readlink()}, which does not exist"
        if path.is_dir():
            return "is a folder; expected a file"
        return None if path.exists() else "is not there; get it again"
    except OSError as error:  # a name too long for the file system
        return f"cannot be opened: {error.strerror}"
