"""Checkpoints of quantization libraries, made by the library itself where it runs here, scanned by layers.

Against the same library's dequantized model: its weights in a plain model, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mwtool import scan_checkpoint, scan_model
from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models import packed_formats
from mwtool.models.load import load
from mwtool.models.packed_integers import CompressedTensors, Transposed
from mwtool.models.quantization import refuse_packed_away
from mwtool.quantization.check import quantize_check
from mwtool.scan.plan import plan_scan
from mwtool.surgery.attack import Attack, edited


def planted(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny model with a massive row, wide enough for blocks of 64 values."""
    made = tiny.model(model_type, torch.bfloat16, **changes)
    tiny.plant(made)
    return made


def assert_alike(folder: Path, plain: PreTrainedModel) -> tuple[str, ...]:
    """A scan of the folder equals that of the plain model in memory; returns its notes."""
    streamed, whole = scan_checkpoint(str(folder)), scan_model(plain.eval())
    for ours, theirs in zip(streamed.states, whole.states, strict=True):
        for name in ("hidden", "intermediate", "added"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), f"{name} of layer {ours.layer}"
    assert streamed.massive == whole.massive
    assert streamed.events == whole.events
    assert streamed.parameters == whole.parameters
    return streamed.notes


def in_bitsandbytes(folder: Path, made: PreTrainedModel, **options: Any) -> tuple[Path, PreTrainedModel]:
    """Quantized and saved by bitsandbytes, through transformers; and what it dequantizes from those files."""
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import BitsAndBytesConfig

    quantized = AutoModelForCausalLM.from_pretrained(
        tiny.saved(folder / "plain", made), quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    quantized.save_pretrained(folder / "packed")
    again: Any = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.bfloat16)
    return folder / "packed", again.dequantize(torch.bfloat16)


@pytest.mark.parametrize("stored", ["uint8", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_scan_of_4_bit_bitsandbytes_equals_that_of_its_dequantized_model(
    tmp_path: Path, kind: str, *, nested: bool, stored: str
) -> None:
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": stored}
    folder, plain = in_bitsandbytes(tmp_path, planted(), load_in_4bit=True, **options)
    notes = assert_alike(folder, plain)
    packed = [name for name in load_file(folder / "model.safetensors") if name.endswith(f"bitsandbytes__{kind}")]
    assert notes[0] == f"{len(packed)} weights were dequantized from bitsandbytes, {kind}"
    nested_scales = [name for name in load_file(folder / "model.safetensors") if name.endswith("nested_absmax")]
    assert bool(nested_scales) is nested


def test_a_scan_of_8_bit_bitsandbytes_equals_that_of_its_dequantized_model(tmp_path: Path) -> None:
    folder, plain = in_bitsandbytes(tmp_path, planted(), load_in_8bit=True)
    packed = [name for name in load_file(folder / "model.safetensors") if name.endswith(".SCB")]
    assert assert_alike(folder, plain)[0] == f"{len(packed)} weights were dequantized from bitsandbytes, 8 bit"


def test_an_8_bit_weight_whose_scales_do_not_fit_is_named(tmp_path: Path) -> None:
    folder, _ = in_bitsandbytes(tmp_path, planted(), load_in_8bit=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.1.mlp.up_proj.SCB": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"layers.1.mlp.up_proj.weight holds torch.int8 .* and one scale a row"):
        scan_checkpoint(str(folder))


def test_a_dry_run_counts_packed_weights_as_they_are_stored(tmp_path: Path) -> None:
    folder, _ = in_bitsandbytes(tmp_path, planted(), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plan = plan_scan(str(folder))
    tensors = load_file(folder / "model.safetensors")
    layers = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." in name)
    idle = sum(one.nbytes for name, one in tensors.items() if ".q_proj." in name or ".k_proj." in name)
    assert plan.spared == idle
    assert sum(part.size for part in plan.parts if part.name.startswith("layer ")) == layers - idle


def test_a_module_that_stores_its_weight_the_other_way_round_is_scanned_as_the_library_has_it(tmp_path: Path) -> None:
    """GPT-2's matrices are (in, out), and packed as (out, in): a square one would fit both ways."""
    folder, linear = in_bitsandbytes(tmp_path, planted("gpt2"), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plain = planted("gpt2")
    for path, module in plain.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found = linear.get_parameter(f"{path}.{name}").data
            parameter.data.copy_(found.T if isinstance(module, Conv1D) and found.ndim == 2 else found)
    assert_alike(folder, plain)


def test_a_format_whose_library_is_missing_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.saved(tmp_path, planted())
    said(folder, quant_method="bitsandbytes", load_in_4bit=True)
    monkeypatch.setattr(packed_formats, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match="not installed; `pip install bitsandbytes`"):
        scan_checkpoint(str(folder))


def test_weights_that_are_not_packed_as_the_configuration_says_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    folder = tiny.saved(tmp_path, planted())
    said(folder, quant_method="bitsandbytes", load_in_4bit=True)
    with pytest.raises(BadCheckpoint, match="says bitsandbytes, and no tensor is packed so"):
        scan_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ("absmax", None, r"layers.1.mlp.up_proj of .* is packed and has no .*weight.absmax; get it again"),
        ("quant_state.bitsandbytes__nf4", torch.zeros(8, dtype=torch.uint8), "up_proj.weight"),
    ],
)
def test_a_damaged_part_of_a_4_bit_weight_is_named(tmp_path: Path, part: str, value: Any, expected: str) -> None:
    folder, _ = in_bitsandbytes(tmp_path, planted(), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.weight.{part}"
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=expected):
        scan_checkpoint(str(folder))


def in_compressed_tensors(folder: Path, made: PreTrainedModel, form: str, **weights: Any) -> Path:
    """Compressed by the library, module by module; `made` is given what the library decompresses from that."""
    library = pytest.importorskip("compressed_tensors", reason="an optional library")
    scheme = library.quantization.QuantizationScheme(
        targets=["Linear"], weights=library.quantization.QuantizationArgs(type="int", **weights), format=form
    )
    compressor = library.compressors.base.BaseCompressor.get_value_from_registry(form)
    tensors = load_file(tiny.saved(folder, made) / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        path, weight = name.removesuffix("weight"), tensors.pop(name)
        groups = weight.shape[1] // weights["group_size"] if weights["strategy"] == "group" else 1
        grouped = weight.float().unflatten(1, (groups, -1))
        levels = 2 ** weights["num_bits"] - 1
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = (
            (high - low) / levels if not weights["symmetric"] else grouped.abs().amax(-1) / (levels // 2)
        ).bfloat16()
        stored = {"weight": weight, "weight_scale": scale}
        if not weights["symmetric"]:
            least = -(levels + 1) // 2
            stored["weight_zero_point"] = (least - low / scale.float()).round().clamp(least, -least - 1).to(torch.int8)
        packed = compressor.compress(stored, scheme)
        tensors |= {path + part: value.contiguous() for part, value in packed.items()}
        made.get_parameter(name).data.copy_(compressor.decompress(packed, scheme)["weight"])
    save_file(tensors, folder / "model.safetensors")
    method = library.quantization.QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head"])
    said(folder, **{**method.model_dump(mode="json"), "quant_method": "compressed-tensors"})
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
        ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16}),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ],
)
def test_a_scan_of_compressed_tensors_equals_that_of_its_decompressed_model(
    tmp_path: Path, form: str, options: dict[str, Any], *, symmetric: bool
) -> None:
    plain = planted()
    folder = in_compressed_tensors(tmp_path, plain, form, symmetric=symmetric, **options)
    assert assert_alike(folder, plain)[0].endswith(
        f"dequantized from compressed-tensors, {form} int{options['num_bits']}"
    )
    found = scan_checkpoint(str(folder)).protect[0].checkpoint_name
    assert found == f"model.layers.1.mlp.up_proj.weight{'_packed' if form == 'pack-quantized' else ''}"


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_those_of_a_plain_loop(bits: int) -> None:
    """Weights of 3 x 13 in words of 32 bits, the last of which is not full; zero points are packed along the output."""
    half, each = 2 ** (bits - 1), 32 // bits
    made = torch.Generator().manual_seed(0)
    numbers = torch.randint(-half, half, (3, 13), generator=made)
    zeros = torch.randint(-half, half, (3, 1), generator=made)
    scale = torch.rand(3, 1, generator=made)

    def word(values: list[int]) -> int:
        whole = sum((value + half) << (bits * place) for place, value in enumerate(values))
        return whole - 2**32 if whole >= 2**31 else whole

    rows = [[word(row[i : i + each]) for i in range(0, 13, each)] for row in numbers.tolist()]
    parts = {
        "weight_packed": torch.tensor(rows, dtype=torch.int32),
        "weight_scale": scale,
        "weight_zero_point": torch.tensor([[word(zeros[:, 0].tolist())]], dtype=torch.int32),
        "weight_shape": torch.tensor([3, 13]),
    }
    assert torch.equal(CompressedTensors("w", parts).weight(), (numbers.float() - zeros) * scale)


def words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """(R, W * 32 / bits) unsigned integers in (R, W) words, by a plain loop. order: which number is put where."""
    each = 32 // bits
    order = order or tuple(range(each))
    rows = []
    for row in numbers.tolist():
        groups = [row[start : start + each] for start in range(0, len(row), each)]
        whole = [sum(group[place] << (bits * at) for at, place in enumerate(order)) for group in groups]
        rows.append([one - 2**32 if one >= 2**31 else one for one in whole])
    return torch.tensor(rows, dtype=torch.int32)


def in_gptq_or_awq(folder: Path, made: PreTrainedModel, method: str, bits: int, *, v1: bool, shuffled: bool) -> Path:
    """Written by the published layout; `made` is given the weights that a loop over groups finds."""
    tensors = load_file(tiny.saved(folder, made) / "model.safetensors")
    drawn = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "_proj.weight" in name]:
        path, weight = name.removesuffix("weight"), tensors.pop(name)
        out, columns = weight.shape
        group = torch.arange(columns) // 16
        if shuffled:
            group = group[torch.randperm(columns, generator=drawn)]
        zeros = torch.randint(1, 2**bits, (columns // 16, out), generator=drawn)  # (groups, out)
        scale = (weight.float().abs().max() / 2 ** (bits - 1)).half().expand(zeros.shape) * (
            1 + torch.rand(zeros.shape, generator=drawn)
        ).half()
        numbers = torch.empty(columns, out, dtype=torch.long)
        for column in range(columns):
            exact = weight[:, column].float() / scale[group[column]].float() + zeros[group[column]]
            numbers[column] = exact.round().clamp(0, 2**bits - 1)
            value = (numbers[column] - zeros[group[column]]).half() * scale[group[column]]
            made.get_parameter(name).data[:, column] = value
        if method == "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            packed = {"qweight": words(numbers, bits, order), "qzeros": words(zeros, bits, order)}
        else:
            packed = {"qweight": words(numbers.T, bits).T.contiguous(), "qzeros": words(zeros - int(v1), bits)}
            packed["g_idx"] = group.int()
        tensors |= {path + part: value for part, value in {**packed, "scales": scale.contiguous()}.items()}
    save_file(tensors, folder / "model.safetensors")
    stated = {"checkpoint_format": "gptq" if v1 else "gptq_v2", "desc_act": shuffled} if method == "gptq" else {}
    said(folder, quant_method=method, bits=bits, group_size=16, **stated)
    return folder


@pytest.mark.parametrize(
    ("method", "bits", "v1", "shuffled"),
    [
        ("gptq", 4, True, False),
        ("gptq", 4, False, True),
        ("gptq", 8, True, True),
        ("awq", 4, False, False),
    ],
)
def test_a_scan_of_gptq_and_awq_equals_that_of_weights_found_by_a_plain_loop(
    tmp_path: Path, method: str, bits: int, *, v1: bool, shuffled: bool
) -> None:
    plain = planted()
    folder = in_gptq_or_awq(tmp_path, plain, method, bits, v1=v1, shuffled=shuffled)
    assert assert_alike(folder, plain)[0].endswith(f"dequantized from {method.upper()}, {bits} bit")
    assert scan_checkpoint(str(folder)).protect[0].checkpoint_name == "model.layers.1.mlp.up_proj.qweight"


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights_are_those_of_gptqmodel(bits: int) -> None:
    """Packed by the library, and undone by its own module for CPUs; zero points of 0 wrap round in the first layout."""
    library: Any = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="an optional library")
    module = library.TorchLinear(
        bits=bits, group_size=32, sym=False, desc_act=True, in_features=64, out_features=32, bias=False
    )
    drawn = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    scale = torch.rand(32, 2, generator=drawn) / 10
    zeros = torch.randint(0, 2**bits, (32, 2), generator=drawn).float()
    module.pack_original(linear, scale, zeros, (torch.arange(64) // 32)[torch.randperm(64, generator=drawn)].int())
    parts = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    module.post_init()
    expected = module.dequantize_weight().T
    assert torch.equal(Transposed(name="w", parts=parts, bits=bits).weight(), expected)
    one = sum(1 << place for place in range(0, 32, bits))
    first = {**parts, "qzeros": parts["qzeros"] - one}
    assert torch.equal(Transposed(name="w", parts=first, bits=bits, offset=1).weight(), expected)


def test_awq_weights_are_those_of_gptqmodel() -> None:
    library: Any = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils", reason="an optional library")
    drawn = torch.Generator().manual_seed(0)
    numbers, zeros = (torch.randint(0, 16, (rows, 24), generator=drawn, dtype=torch.int32) for rows in (64, 2))
    scales = torch.rand(2, 24, generator=drawn).half()
    qweight, qzeros = library.pack_awq(numbers, zeros, 4)
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    expected = library.dequantize_gemm(qweight, qzeros, scales, 4, 32).T
    assert torch.equal(Transposed(name="w", parts=parts, bits=4, awq=True).weight(), expected)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"quant_method": "gptq", "bits": 3}, "with gptq, gptq, in 3 bits; mwtool reads"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "with gptq, marlin, in 4 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {"bits": 8}}}, "with gptq, gptq, in 4, 8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "with awq, gemv, in 4 bits; mwtool reads"),
        ({"quant_method": "hqq"}, "is quantized with hqq, which mwtool cannot dequantize"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, method: dict[str, Any], expected: str) -> None:
    folder = tiny.saved(tmp_path, planted())
    said(folder, **method)
    with pytest.raises(UnsupportedModel, match=expected):
        scan_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("group", "form", "expected"),
    [
        (
            {"weights": {"num_bits": 4, "type": "float"}},
            "nvfp4-pack-quantized",
            "as nvfp4-pack-quantized; mwtool reads",
        ),
        ({"weights": {"num_bits": 8, "strategy": "block"}}, "int-quantized", "as block; mwtool reads"),
    ],
)
def test_other_kinds_of_compressed_tensors_are_refused_by_name(
    tmp_path: Path, group: dict[str, Any], form: str, expected: str
) -> None:
    folder = tiny.saved(tmp_path, planted())
    said(folder, quant_method="compressed-tensors", format=form, config_groups={"group_0": group})
    with pytest.raises(UnsupportedModel, match=expected):
        scan_checkpoint(str(folder))


def test_a_packed_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    folder, _ = in_bitsandbytes(tmp_path, planted(), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    scan = scan_checkpoint(str(folder))
    with pytest.raises(UnsupportedModel, match="is quantized already"):
        quantize_check(load(str(folder)), scan, [])


def said(folder: Path, **method: Any) -> None:
    """Write a quantization_config into a saved model's configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))


@pytest.mark.parametrize("stated", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_plain_weights_that_are_said_to_be_packed_by_bitsandbytes_are_refused_before_they_run(
    tmp_path: Path, stated: dict[str, bool]
) -> None:
    folder = tiny.saved(tmp_path / "model", planted())
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", **stated}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BadCheckpoint, match="says bitsandbytes, and no tensor is packed so"):
        load(str(folder))


@pytest.mark.parametrize("stated", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantized_layers_are_not_offloaded(tmp_path: Path, stated: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    folder, _ = in_bitsandbytes(tmp_path, planted(), **stated)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": "cpu" if index else "disk" for index in range(tiny.LAYERS)}
    with pytest.raises(
        UnsupportedModel, match=r"is quantized and cannot be spread like this: .*; quantized layers have"
    ):
        load(str(folder), model_options={"device_map": places, "offload_folder": str(tmp_path / "off")})


def test_packed_weights_that_accelerate_would_load_without_their_scales_are_refused() -> None:
    from accelerate import cpu_offload

    model = tiny.model("llama", num_hidden_layers=2)
    refuse_packed_away("plain", cpu_offload(model, execution_device=torch.device("cpu")))
    packed = torch.empty(16, 1, dtype=torch.uint8, device="meta")
    model.get_submodule("model.layers.1.mlp.up_proj").weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"m is quantized, and model.layers.1.mlp.up_proj would be offloaded"):
        refuse_packed_away("m", model)
    ffn = tiny.layers_of(model)[1].ffns[0]
    with pytest.raises(UnsupportedModel, match=r"model.layers.1.mlp.* is quantized and offloaded"):
        edited(model, ffn, [1], Attack("zero", 1)).__enter__()
