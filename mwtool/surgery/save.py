"""An attacked model as a checkpoint of its own: the original's files with the rows changed in place.

Files are copied and only the bytes of the attacked tensors are written anew, so that
shards, names, dtypes and every other tensor stay as they were.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool._version import __version__
from mwtool.architecture.packed import PLAIN, is_packed
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.files.atomic_write import check_free, filling
from mwtool.layout import WeightSlice
from mwtool.models.load import Loaded
from mwtool.models.rewrite import RECORD, New, by_stored_name, check_tied, copy_small_files, rewrite_files, whole_state
from mwtool.surgery.attack import Attack, Edit, attacked_rows, edited_together, merged_edits, places

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_attacked(loaded: Loaded, edits: Sequence[Edit], attack: Attack, folder: Path) -> None:
    """Write the model with the rows of `edits` attacked to `folder`, which must not exist or be empty.

    With an adapter kept apart it is the sum of both that is written, the rows taken out of the part `loaded.on` says.
    Raises BadValue for an attack that is no change of weights, UnsupportedModel where the checkpoint's tensors
    cannot be changed, OutputError where it cannot be written; nothing is left then.
    """
    check_savable(loaded, attack)
    check_free(folder)
    new = _attacked(loaded, edits, attack) if loaded.source.adapter is None else _merged(loaded, edits, attack)
    with filling(folder) as temporary:
        rewrite_files(loaded.source, by_stored_name(loaded, new), temporary)
        copy_small_files(loaded.source, temporary)
        _record(temporary / RECORD, loaded, edits, attack)


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
        check_tied(loaded)


def _attacked(loaded: Loaded, edits: Sequence[Edit], attack: Attack) -> dict[str, New]:
    """Stored name -> the tensor with the attacked entries changed. Only shapes are read: the model may be offloaded."""
    from transformers.core_model_loading import revert_weight_conversion

    masks: dict[str, Tensor] = {}
    for edit in merged_edits(edits):
        selected = attacked_rows(edit.rows, edit.ffn.width(loaded.base), attack)
        for place in places(edit.ffn) if selected and not attack.idle else ():
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


def _merged(loaded: Loaded, edits: Sequence[Edit], attack: Attack) -> dict[str, New]:
    """Stored name -> the tensor of base and adapter together, for all tensors. Under `base` a copy is merged."""
    with edited_together(loaded.base, edits, attack):
        model: Any = copy.deepcopy(loaded.model)
    if loaded.on == "base":
        model = model.merge_and_unload()
        # a DoRA row without norm: 0/0 in the merged weight, zero in the model that was measured
        for place in (place for edit in edits for place in edit.ffn.inputs):
            place.read(model).nan_to_num_(nan=0.0)
    return whole_state(model)


def _record(path: Path, loaded: Loaded, edits: Sequence[Edit], attack: Attack) -> None:
    """Where the checkpoint came from and what was done to it."""
    taken = [{"module": edit.ffn.module, "expert": edit.ffn.expert, "indices": list(edit.rows)} for edit in edits]
    said = {
        "schema": "mwtool.attacked/1",
        "mwtool_version": __version__,
        "model": loaded.source.name,
        "revision": loaded.source.revision,
        "adapter": loaded.source.adapter,
        "on": loaded.on,
        "attack": attack.name,
        **(taken[0] if len(taken) == 1 else dict.fromkeys(taken[0])),
        "places": taken,
    }
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
