"""Columns of ``W_down`` that a quantizer rounded, given back by a standard PEFT adapter.

What quantizing changes in k columns is a matrix of rank k: with ``W`` the original and ``Q`` the quantized matrix,
both (H, I), and c the columns, ``(W - Q)[:, c] @ E`` with E the rows c of the identity of size I. That is a LoRA update
whose A is E and whose B is the difference, at scale 1, so every tool that loads PEFT adapters can apply it beside any
quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at
from mwtool.errors import BadValue, UnsupportedModel
from mwtool.files.atomic_write import atomic_folder, permissions
from mwtool.models.locate import locate
from mwtool.models.streaming import open_stream
from mwtool.quantization.export import chosen_events

if TYPE_CHECKING:
    from torch import Tensor

    from mwtool.architecture.layout import FFN
    from mwtool.models.load import Loaded

Columns = Mapping[int, tuple[int, ...]]
"""Decoder layer -> columns of its ``W_down``, in the order in which they are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What quantizing changed in some columns of one matrix.

    module: path of the module that applies ``W_down``; transposed: whether it stores (in, out). columns: which, k of
    width I. difference: original less quantized, (H, k), float32. relative: its norm over that of the original columns.
    """

    layer: int
    module: str
    transposed: bool
    columns: tuple[int, ...]
    width: int
    difference: Tensor
    relative: float


def columns_of(document: Mapping[str, Any], events: Sequence[int] | None, k: int) -> dict[int, tuple[int, ...]]:
    """The top k columns at each chosen event of a scan document (schema mwtool.scan/2), by decoder layer.

    events: their numbers as the scan prints them; None for all. Raises BadValue as `chosen_events` does, where fewer
    than k rows were ranked, and for rows of a routed expert, whose matrices PEFT's LoRA layers do not reach.
    """
    found = document["events"]
    chosen: dict[int, tuple[int, ...]] = {}
    for number in chosen_events(document, events):
        rows = found[number]["rows"]
        if rows["expert"] is not None:
            raise BadValue(
                f"event {number} is in expert {rows['expert']} of layer {rows['layer']}; expected a dense FFN"
            )
        if len(rows["indices"]) < k:
            raise BadValue(f"k is {k}; the scan ranked {len(rows['indices'])} rows at an event: scan with -k {k}")
        ranked = (*chosen.get(rows["layer"], ()), *rows["indices"][:k])
        chosen[rows["layer"]] = tuple(dict.fromkeys(ranked))
    return dict(sorted(chosen.items()))


@torch.no_grad()
def corrections(model: str, quantized: Loaded, columns: Columns, *, revision: str | None = None) -> list[Correction]:
    """The differences between a checkpoint and a quantized model, in these columns of each layer.

    model: the original: Hub id, folder or GGUF file; it is read one layer at a time. quantized: loaded whole, by
    whatever quantizer made it; its columns are what each module answers to a unit vector.
    Raises BadValue where the two do not have the same shapes, and UnsupportedModel where a layer's ``W_down`` is not a
    linear module of its own.
    """
    found = []
    for (layer, chosen), original in zip(columns.items(), _originals(model, revision, columns), strict=True):
        ffn = ffn_at(quantized.layers, layer, None)
        width, rounded = _answers(quantized, ffn, chosen)
        module = ffn.down.param.rpartition(".")[0]
        if rounded.shape != original.shape:
            raise BadValue(
                f"{module} has outputs of {len(rounded)} in {quantized.source.name} and of {len(original)} in {model}; "
                "expected one model before and after quantizing"
            )
        difference = original - rounded
        relative = float(difference.norm() / original.norm().clamp(min=torch.finfo(torch.float32).tiny))
        found.append(
            Correction(
                layer=layer,
                module=module,
                transposed=ffn.down.transposed,
                columns=chosen,
                width=width,
                difference=difference,
                relative=relative,
            )
        )
    return found


def _originals(model: str, revision: str | None, columns: Columns) -> Iterator[Tensor]:
    """The columns (H, k) of each layer in turn, float32."""
    source = locate(model, revision)
    config = source.config()
    layers = tuple(decoder_layers(adapter_for(config.model_type), config))
    stream = open_stream(source, config, layers, "float32")
    for layer, chosen in columns.items():
        with stream.holding(layers[layer], ffn_at(layers, layer, None)) as ffn:
            weight = ffn.down.read(stream.model)
            _refuse_beyond(chosen, weight.shape[1], model)
            yield weight[:, list(chosen)].clone()


def _answers(quantized: Loaded, ffn: FFN, columns: Sequence[int]) -> tuple[int, Tensor]:
    """The width I, and the columns (H, k) of a module's matrix: its outputs for unit vectors, less its bias."""
    if ffn.down.index:
        raise UnsupportedModel(f"{ffn.down.param} is part of a fused parameter; expected a linear module of its own")
    module: Any = quantized.base.get_submodule(ffn.down.param.rpartition(".")[0])
    width = ffn.width(quantized.base)
    _refuse_beyond(columns, width, quantized.source.name)
    device = next(module.parameters()).device
    inputs = torch.zeros(len(columns) + 1, width, dtype=quantized.base.dtype, device=device)
    inputs[range(len(columns)), list(columns)] = 1
    outputs = module(inputs).float().cpu()
    return width, (outputs[:-1] - outputs[-1]).T


def _refuse_beyond(columns: Sequence[int], width: int, model: str) -> None:
    if max(columns) >= width:
        raise BadValue(f"column {max(columns)} does not exist in {model}, whose FFNs have {width}; scan this model")


def write_correction(found: Sequence[Correction], quantized: str, folder: Path) -> None:
    """Write the corrections as a PEFT adapter of the quantized model.

    quantized: what the adapter names as its base model. folder: absent or empty. Raises OutputError.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {one.module: len(one.columns) for one in found}
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    config = LoraConfig(
        base_model_name_or_path=quantized,
        task_type="CAUSAL_LM",
        r=most,
        lora_alpha=most,  # a scale of 1
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(ranks),
        fan_in_fan_out=any(one.transposed for one in found),
        inference_mode=True,
    )
    tensors = {}
    for one in found:
        picked = torch.zeros(len(one.columns), one.width)
        picked[range(len(one.columns)), list(one.columns)] = 1
        tensors[f"base_model.model.{one.module}.lora_A.weight"] = picked
        tensors[f"base_model.model.{one.module}.lora_B.weight"] = one.difference.contiguous()
    with atomic_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        permissions(temporary)
