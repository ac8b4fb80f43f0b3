"""Rewrite a checkpoint with some tensors changed; all other bytes are unchanged.

Safetensors files are copied and only the bytes of the changed tensors are written, so that shards, names and dtypes
stay. Also how a base model and its PEFT adapter are written as one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mwtool.architecture.packed import PLAIN
from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.files.atomic_write import atomic_folder, check_free
from mwtool.files.text import read_json
from mwtool.models.checkpoint import Checkpoint, open_checkpoint
from mwtool.models.load import Loaded
from mwtool.models.source import ADAPTER_CONFIG, Source
from mwtool.models.weight_files import LEGACY_INDEX, SAFETENSORS, SAFETENSORS_INDEX

KEPT = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*"),
)
"""Configuration, tokenizer and license. The model card describes another model and is not copied."""


RECORD = "mwtool.json"


New = Callable[[Tensor], Tensor]
"""A function from the stored tensor to the new one."""


def save_merged(loaded: Loaded, folder: Path) -> None:
    """Write a base model merged with its PEFT adapter to `folder`, which must not exist or be empty.

    loaded: an adapter folder's model under ``on="merged"``. The checkpoint has the base's shards, names and types.
    Raises UnsupportedModel where the base's tensors cannot be changed, OutputError where it cannot be written; nothing
    is left then.
    """
    check_tied(loaded)
    check_free(folder)
    with atomic_folder(folder) as temporary:
        rewrite_files(loaded.source, by_stored_name(loaded, whole_state(loaded.base)), temporary)
        copy_small_files(loaded.source, temporary)


def check_tied(loaded: Loaded) -> None:
    """Raises UnsupportedModel if the adapter changes one of two tied parameters: the checkpoint stores one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    model: Any = loaded.base
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        modules = [model.get_submodule(name.rpartition(".")[0]) for name in pair]
        adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in modules)
        if adapted or modules[0].weight is not modules[1].weight:
            raise UnsupportedModel(
                f"the adapter changes {pair[0]} or {pair[1]}, which are tied and stored once; untie them in the base "
                f"model, or merge and save the model with PEFT and use the result"
            )


def whole_state(model: Any) -> dict[str, New]:
    """Name in the checkpoint -> the tensor of this model, for all tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: partial(_cast, tensor) for name, tensor in revert_weight_conversion(model, state).items()}


def _cast(tensor: Tensor, stored: Tensor) -> Tensor:
    if stored.dtype not in PLAIN or tensor.shape != stored.shape:
        raise UnsupportedModel(
            "the base model's checkpoint is quantized, so a merged model cannot be saved in it; use the original model"
        )
    return tensor.to("cpu", stored.dtype)


def by_stored_name(loaded: Loaded, new: Mapping[str, New]) -> dict[str, New]:
    """The tensors by the names in the files, with or without the base model's prefix.

    Raises UnsupportedModel if the checkpoint has no tensor of that name.
    """
    files, prefix = open_checkpoint(loaded.source).files, f"{loaded.base.base_model_prefix}."
    found = {}
    for name, value in new.items():
        stored = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in files), None)
        if stored is None:
            raise UnsupportedModel(f"{loaded.source.name} has no tensor {name}; it cannot be saved in the same layout")
        found[stored] = value
    return found


def rewrite_files(source: Source, new: Mapping[str, New], temporary: Path) -> None:
    """Write the weight files, shard by shard, with new values for some tensors.

    Raises BadCheckpoint if a file that the index names is not there.
    """
    checkpoint = open_checkpoint(source)
    if source.gguf is not None:
        _from_gguf(checkpoint, getattr(torch, source.gguf.dtype), new, temporary)
        return
    if checkpoint.legacy is not None:
        _from_legacy(checkpoint.legacy, new, temporary)
        return
    for file in checkpoint.shards:
        path = source.path(file)
        if path is None:
            raise BadCheckpoint(f"{source.name}: {checkpoint.index} names {file}, which is not there; get it again")
        (temporary / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary / file)
        inside = {name: value for name, value in new.items() if checkpoint.files[name] == file}
        with checkpoint.tensors(inside) as tensors:
            _patch(temporary / file, {name: value(tensors[name][...]) for name, value in inside.items()})


def _patch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors of the same name, size and dtype in a safetensors file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, tensor in tensors.items():
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _from_gguf(checkpoint: Checkpoint, dtype: torch.dtype, new: Mapping[str, New], temporary: Path) -> None:
    """A GGUF file becomes one safetensors file, dequantized: blocks cannot hold changed rows exactly."""
    from safetensors.torch import save_file

    with checkpoint.tensors(checkpoint.files) as tensors:
        whole = {name: tensor[...].to(dtype) for name, tensor in tensors.items()}
    save_file(
        whole | {name: value(whole[name]) for name, value in new.items()}, temporary / SAFETENSORS, {"format": "pt"}
    )


def _from_legacy(stored: Mapping[str, Tensor], new: Mapping[str, New], temporary: Path) -> None:
    """Write a ``.bin`` checkpoint as one safetensors file, since a pickle cannot be changed in place."""
    from safetensors.torch import save_file

    # cloned, because tied tensors share memory, which safetensors does not allow
    whole = {name: new[name](tensor) if name in new else tensor.clone() for name, tensor in stored.items()}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, temporary / SAFETENSORS, {"format": "pt"})


def copy_small_files(source: Source, temporary: Path) -> None:
    """Copy configuration, tokenizer, chat templates and license, and the modeling code if there is any.

    An index that the checkpoint was not read by stays behind, and so does what an adapter left beside the model.
    """
    if source.gguf is not None:
        source.config().save_pretrained(temporary)
        tokenizer = source.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        return
    patterns = [*KEPT, *(["*.py"] if "auto_map" in read_json(source.folder / "config.json") else [])]
    left = {LEGACY_INDEX, RECORD, ADAPTER_CONFIG}
    if open_checkpoint(source).index != SAFETENSORS_INDEX:
        left.add(SAFETENSORS_INDEX)
    for file in {file for pattern in patterns for file in source.folder.glob(pattern) if file.is_file()}:
        if file.name not in left:
            copy = temporary / file.relative_to(source.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
