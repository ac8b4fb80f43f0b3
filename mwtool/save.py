"""An attacked model as a checkpoint of its own: the original's files with the rows changed in place.

Files are copied and only the bytes of the attacked tensors are written anew, so that
shards, names, dtypes and every other tensor stay as they were.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool import __version__
from mwtool.checkpoint import LEGACY_INDEX, SAFETENSORS, open_checkpoint
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.layout import FFN, WeightSlice
from mwtool.load import Loaded
from mwtool.packed import PLAIN, is_packed
from mwtool.source import Source, read_json
from mwtool.surgery import Attack, attacked_rows, edited, places
from mwtool.whole import check_free, filling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*"),
)
"""Configuration, tokenizer and licence; the model's card describes another model and stays behind."""
RECORD = "mwtool.json"


New = Callable[[Tensor], Tensor]
"""What a stored tensor becomes."""


def save_attacked(loaded: Loaded, ffn: FFN, rows: Sequence[int], attack: Attack, folder: Path) -> None:
    """Write the model with `rows` attacked to `folder`, which must not exist or be empty.

    With an adapter kept apart it is the sum of both that is written, the rows taken out of the part `loaded.on` says.
    Raises BadValue for an attack that is no change of weights, UnsupportedModel where the checkpoint's tensors
    cannot be changed, OutputError where it cannot be written; nothing is left then.
    """
    check_savable(loaded, attack)
    check_free(folder)
    new = _attacked(loaded, ffn, rows, attack) if loaded.source.adapter is None else _merged(loaded, ffn, rows, attack)
    with filling(folder) as temporary:
        _rewrite(loaded.source, _by_stored_name(loaded, new), temporary)
        _copy_small(loaded.source, temporary)
        _record(temporary / RECORD, loaded, ffn, rows, attack)


def save_merged(loaded: Loaded, folder: Path) -> None:
    """Write the sum of a base model and its adapter to `folder`, which must not exist or be empty.

    loaded: an adapter folder's model under ``on="merged"``. The checkpoint has the base's shards, names and types.
    Raises UnsupportedModel where the base's tensors cannot be changed, OutputError where it cannot be written; nothing
    is left then.
    """
    _check_tied(loaded)
    check_free(folder)
    with filling(folder) as temporary:
        _rewrite(loaded.source, _by_stored_name(loaded, _whole(loaded.base)), temporary)
        _copy_small(loaded.source, temporary)


def check_savable(loaded: Loaded, attack: Attack) -> None:
    """Raise before the work begins if the attack is no change of weights, or the weights are packed."""
    if attack.mode == "mean":
        raise BadValue(
            "mean fixes intermediate values, which no weights of this model hold; save zero, retain or scale:X"
        )
    if getattr(loaded.base, "hf_quantizer", None) is not None:
        raise UnsupportedModel(
            f"{loaded.source.name} is quantized, and packed rows cannot be saved changed; save from the "
            f"model it was made of, then quantize that"
        )
    if loaded.source.adapter is not None:
        _check_tied(loaded)


def _check_tied(loaded: Loaded) -> None:
    """An adapter may change one of two parameters that the checkpoint holds once for both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    model: Any = loaded.base
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        modules = [model.get_submodule(name.rpartition(".")[0]) for name in pair]
        adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in modules)
        if adapted or modules[0].weight is not modules[1].weight:
            raise UnsupportedModel(
                f"the adapter changes {pair[0]} or {pair[1]}, which the checkpoint holds once for both; untie them in "
                f"the base model, or merge and save it with PEFT, then ablate that"
            )


def _attacked(loaded: Loaded, ffn: FFN, rows: Sequence[int], attack: Attack) -> dict[str, New]:
    """Stored name -> the tensor with the attacked entries changed. Only shapes are read: the model may be offloaded."""
    from transformers.core_model_loading import revert_weight_conversion

    selected = attacked_rows(rows, ffn.width(loaded.base), attack)
    masks: dict[str, Tensor] = {}
    for place in places(ffn) if selected and not attack.idle else ():
        mask = masks.setdefault(place.param, torch.zeros(_shape(loaded.base, place), dtype=torch.bool))
        view = mask[place.index]
        (view.T if place.transposed else view)[selected] = True
    # masks go the way weights go when transformers saves: unfused, unstacked, renamed
    stored = revert_weight_conversion(loaded.base, masks) if masks else {}
    factor = attack.factor if attack.mode == "scale" and attack.factor is not None else 0.0
    return {name: partial(_scaled, mask, factor) for name, mask in stored.items() if mask.any()}


def _scaled(mask: Tensor, factor: float, tensor: Tensor) -> Tensor:
    if tensor.dtype not in PLAIN or tensor.shape != mask.shape:
        raise UnsupportedModel(
            f"the checkpoint stores the rows as {tensor.dtype} {tuple(tensor.shape)}, which cannot be changed; "
            f"save from the unquantized model"
        )
    return torch.where(mask, tensor * factor if factor else torch.zeros_like(tensor), tensor)


def _shape(model: PreTrainedModel, place: WeightSlice) -> tuple[int, ...]:
    """Shape of the whole parameter; a packed one's is that of its module."""
    path, _, name = place.param.rpartition(".")
    module: Any = model.get_submodule(path)
    parameter = getattr(module, name)
    if is_packed(module, parameter) and hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    return tuple(parameter.shape)


def _merged(loaded: Loaded, ffn: FFN, rows: Sequence[int], attack: Attack) -> dict[str, New]:
    """Stored name -> the tensor of base and adapter together, for all tensors. Under `base` a copy is merged."""
    with edited(loaded.base, ffn, rows, attack):
        model: Any = copy.deepcopy(loaded.model)
    if loaded.on == "base":
        model = model.merge_and_unload()
        # a DoRA row without norm: 0/0 in the merged weight, zero in the model that was measured
        for place in ffn.inputs:
            place.read(model).nan_to_num_(nan=0.0)
    return _whole(model)


def _whole(model: Any) -> dict[str, New]:
    """Stored name -> the tensor of this model, for all of its tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: partial(_cast, tensor) for name, tensor in revert_weight_conversion(model, state).items()}


def _cast(tensor: Tensor, stored: Tensor) -> Tensor:
    if stored.dtype not in PLAIN or tensor.shape != stored.shape:
        raise UnsupportedModel("the base model's checkpoint is quantized; a sum with its adapter cannot be saved in it")
    return tensor.to("cpu", stored.dtype)


def _by_stored_name(loaded: Loaded, new: Mapping[str, New]) -> dict[str, New]:
    """The same under names that the files use: some families' have the base model's prefix, some do not."""
    files, prefix = open_checkpoint(loaded.source).files, f"{loaded.base.base_model_prefix}."
    found = {}
    for name, value in new.items():
        stored = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in files), None)
        if stored is None:
            raise UnsupportedModel(f"{loaded.source.name} has no tensor {name}; it cannot be saved in the same layout")
        found[stored] = value
    return found


def _rewrite(source: Source, new: Mapping[str, New], temporary: Path) -> None:
    """The weight files, shard by shard, with new values for some tensors."""
    checkpoint = open_checkpoint(source)
    if checkpoint.legacy is not None:
        _from_legacy(checkpoint.legacy, new, temporary)
        return
    for file in sorted(set(checkpoint.files.values())):
        path = source.path(file)
        assert path is not None, "open_checkpoint has found it"
        shutil.copyfile(path, temporary / file)
        inside = {name: value for name, value in new.items() if checkpoint.files[name] == file}
        with checkpoint.tensors(inside) as tensors:
            _patch(temporary / file, {name: value(tensors[name][...]) for name, value in inside.items()})


def _patch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors over those of the same name, size and dtype in a safetensors file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, tensor in tensors.items():
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _from_legacy(stored: Mapping[str, Tensor], new: Mapping[str, New], temporary: Path) -> None:
    """A ``.bin`` checkpoint becomes one safetensors file: pickles cannot be changed in place."""
    from safetensors.torch import save_file

    # cloned, because tied tensors share memory, which safetensors refuses
    whole = {name: new[name](tensor) if name in new else tensor.clone() for name, tensor in stored.items()}
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, temporary / SAFETENSORS, {"format": "pt"})


def _copy_small(source: Source, temporary: Path) -> None:
    patterns = [*KEPT, *(["*.py"] if "auto_map" in read_json(source.folder / "config.json") else [])]
    for file in {file for pattern in patterns for file in source.folder.glob(pattern) if file.is_file()}:
        if file.name not in (LEGACY_INDEX, RECORD):
            copy = temporary / file.relative_to(source.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _record(path: Path, loaded: Loaded, ffn: FFN, rows: Sequence[int], attack: Attack) -> None:
    """Where the checkpoint came from and what was done to it."""
    said = {
        "schema": "mwtool.attacked/1",
        "mwtool_version": __version__,
        "model": loaded.source.name,
        "revision": loaded.source.revision,
        "adapter": loaded.source.adapter,
        "on": loaded.on,
        "attack": attack.name,
        "module": ffn.module,
        "expert": ffn.expert,
        "indices": list(rows),
    }
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
