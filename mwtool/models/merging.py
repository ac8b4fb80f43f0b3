"""A LoRA or DoRA adapter merged into a streamed model: into each module when its weights have been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mwtool.errors import UnsupportedModel
from mwtool.models.meta_model import build
from mwtool.models.offloaded_adapter import stood_in
from mwtool.models.peft_adapter import applied

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mwtool.models.checkpoint import Checkpoint
    from mwtool.models.source import Source


@dataclass(frozen=True, slots=True)
class Merging:
    """The layers of an adapter by the path of the module that each is for."""

    layers: Mapping[str, Any]

    def into(self, path: str, module: nn.Module, without: frozenset[str] = frozenset()) -> None:
        """Add the adapter to the weights of a module and of those in it, as PEFT's `merge_and_unload` does.

        path: of the module in the model. Its weights are on the device for which the adapter was opened.
        without: parameters that are left out, by their names in the model.
        """
        for name, child in module.named_modules():
            place = f"{path}.{name}" if name else path
            layer = self.layers.get(place)
            if layer is None or f"{place}.weight" in without:  # DoRA's norm of zeros would be 0, and divides them
                continue
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.clone()  # it may be the checkpoint's own, to be read again
            empty, layer.base_layer = layer.base_layer, child
            layer.merge()
            layer.base_layer, layer.merged_adapters = empty, []


def open_merging(source: Source, config: PretrainedConfig, checkpoint: Checkpoint, dtype: str, device: str) -> Merging:
    """The adapter of a source, in memory on `device`; of the base model only shapes are needed.

    Raises BadCheckpoint for one that does not fit the base model, UnsupportedModel for adapters of experts and
    embeddings and for those that hold weights of the base model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    assert source.adapter is not None
    empty = build(source, config, checkpoint, dtype, device).model
    with stood_in(empty, device):
        wrapped = applied(empty, source.adapter, alone="merged a layer at a time")
    found: dict[str, Any] = {}
    for path, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
                raise UnsupportedModel(
                    f"the adapter {source.adapter} changes {path}, a {type(layer.get_base_layer()).__name__}, and "
                    f"cannot be merged a layer at a time; merge and save the two with PEFT, and take that"
                )
            found[path] = layer
    return Merging(found)
