"""Quantized checkpoints that are dequantized layer by layer, against the formula of their format."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mwtool import Scan, scan_checkpoint, scan_model
from mwtool.errors import UnsupportedModel
from mwtool.models import quantization
from mwtool.models.load import load
from mwtool.scan.loaded import massive_for

FP8 = pytest.mark.skipif(
    version("transformers").startswith("5.16."), reason="this transformers fails over every model in FP8"
)
BLOCK = 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of 4 bits: sign, two of exponent, one of mantissa."""


def as_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 16 x 16, each scaled to the range of e4m3, and what to multiply them by."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / 448  # (rows / 16, columns / 16)
    packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return packed.view(rows, columns), scale


def from_fp8(packed: Tensor, scale: Tensor) -> Tensor:
    return packed.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks: (E, rows, groups, 16) bytes of two values, low half first; scales: (E, rows, groups) exponents + 127."""
    pairs = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], dim=-1)  # (E, rows, groups, 16, 2)
    values = pairs.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]  # (E, rows, groups, 32)
    return values.flatten(-2).transpose(1, 2)  # stored as (E, rows, columns), used as (E, columns, rows)


def quantized(folder: Path, tensors: dict[str, Tensor], **method: Any) -> Path:
    """Replace a saved model's tensors and say in its configuration how they are packed."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return folder


def fp8_llama(folder: Path) -> tuple[Path, PreTrainedModel]:
    """A checkpoint in FP8, and the plain model with what its numbers stand for."""
    model = tiny.model("llama", torch.bfloat16, tie_word_embeddings=False)
    tiny.plant(model)
    tensors = load_file(tiny.saved(folder, model) / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        packed, scale = as_fp8(tensors[name])
        tensors |= {name: packed, f"{name}_scale_inv": scale}
        model.get_parameter(name).data.copy_(from_fp8(packed, scale))
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return quantized(folder, tensors, **method, modules_to_not_convert=["lm_head"]), model


def mxfp4_gpt_oss(folder: Path) -> tuple[Path, PreTrainedModel]:
    """Likewise for experts in MXFP4, whose bytes are drawn at random."""
    model = tiny.model("gpt_oss", torch.bfloat16)
    tensors = load_file(tiny.saved(folder, model) / "model.safetensors")
    made = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=made)
        scales = torch.randint(120, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=made)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data.copy_(from_mxfp4(blocks, scales))
    return quantized(folder, tensors, quant_method="mxfp4", modules_to_not_convert=["lm_head"]), model


@pytest.mark.parametrize("make", [pytest.param(fp8_llama, marks=FP8), mxfp4_gpt_oss])
def test_a_dequantized_scan_equals_that_of_the_plain_model(tmp_path: Path, make: Any) -> None:
    """Bit for bit: the values of both formats, scaled, are rounded to bfloat16 once and then computed with alike."""
    folder, plain = make(tmp_path)
    streamed, whole = scan_checkpoint(str(folder)), scan_model(plain)
    assert streamed.dtype == "bfloat16"
    for ours, theirs in zip(streamed.states, whole.states, strict=True):
        for name in ("hidden", "intermediate", "added"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), f"{name} of layer {ours.layer}"
    assert streamed.massive == whole.massive
    assert streamed.parameters == sum(p.numel() for p in plain.parameters())


@FP8
def test_a_model_whose_packed_weights_can_be_undone_is_scanned_from_its_files(tmp_path: Path) -> None:
    """A GPU that computes in FP8 keeps the weights packed; elsewhere transformers undoes them when it loads."""
    folder, _ = fp8_llama(tmp_path)
    loaded = load(str(folder))
    for layer in loaded.layers:
        module = loaded.base.get_submodule(f"{layer.ffns[0].module}.down_proj")
        module.weight = nn.Parameter(as_fp8(module.weight.data)[0], requires_grad=False)
    assert massive_for(loaded) == (scan_checkpoint(str(folder)).massive, ("weights were dequantized from fp8",))


@FP8
def test_rows_to_protect_are_named_as_the_packed_checkpoint_names_them(tmp_path: Path) -> None:
    folder, _ = fp8_llama(tmp_path)
    found: Scan = scan_checkpoint(str(folder))
    assert found.massive is not None
    assert (found.massive.layer, found.massive.indices[0]) == (1, 17)
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate", "down")]
    assert [place.checkpoint_name for place in found.protect] == names
    assert load_file(folder / "model.safetensors").keys() >= set(names)


def test_transformers_that_cannot_read_fp8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = fp8_llama(tmp_path)
    monkeypatch.setattr(quantization, "version", lambda _package: "5.16.1")
    for work in (scan_checkpoint, load):
        with pytest.raises(UnsupportedModel, match=r"FP8, which transformers 5.16.1 cannot read; expected 5.17"):
            work(str(folder))
