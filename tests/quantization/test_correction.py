"""The PEFT adapter of a quantized model gives the chosen columns of down back, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import mwtool
from mwtool.models.load import load
from mwtool.quantization.correction import columns_of, corrections, write_correction
from mwtool.quantization.rounding import Scheme, round_to_nearest
from mwtool.scan.document import scan_document


def rounded(model: torch.nn.Module) -> None:
    """Round every FFN matrix, as any quantizer whose weights are stored as floats again."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("mlp" in name):
            parameter.data = round_to_nearest(parameter.data, Scheme(4, 8))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the original and the quantized model, and the original's scan document."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.model(request.param)
    tiny.plant(model)
    tiny.saved(folder / "original", model)
    document = scan_document(mwtool.scan_checkpoint(str(folder / "original")))
    (folder / "scan.json").write_text(json.dumps(document))
    rounded(model)
    tiny.saved(folder / "quantized", model)
    return folder, document


def test_merged_the_columns_are_the_originals_and_all_other_weights_the_quantized_ones(
    case: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, document = case
    columns = columns_of(document, None, 2)
    quantized = load(str(folder / "quantized"))
    found = corrections(str(folder / "original"), quantized, columns)
    write_correction(found, str(folder / "quantized"), tmp_path / "adapter")
    merged: Any = load(str(tmp_path / "adapter"), on="merged")
    original = load(str(folder / "original"))
    changed = {one.module: list(one.columns) for one in found}
    for name, weight in merged.base.named_parameters():
        plain = quantized.base.get_parameter(name)
        module = name.removesuffix(".weight")
        if module not in changed or name == module:
            assert torch.equal(weight, plain), name
            continue
        transposed = found[0].transposed
        expected = plain.clone()
        view, wanted = (expected.T if transposed else expected), original.base.get_parameter(name)
        view.data[:, changed[module]] = (wanted.T if transposed else wanted).data[:, changed[module]]
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)  # a sum of two float32 numbers below 10


def test_the_command_writes_an_adapter_that_every_command_reads(
    case: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = case
    arguments = ["--to", "peft", "--quantized", folder / "quantized", "-o", tmp_path / "columns", "-k", "2"]
    done = run("export", folder / "scan.json", *arguments)
    assert (done.code, done.out) == (0, "")
    assert "mwtool eval" in done.err
    assert load(str(tmp_path / "columns")).on == "base"
    assert "is not an empty folder" in run("export", folder / "scan.json", *arguments).fault


def test_on_a_bitsandbytes_model_the_module_computes_with_the_original_columns(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    model = tiny.model("llama", torch.bfloat16, hidden_size=64, intermediate_size=128)
    tiny.plant(model)
    tiny.saved(tmp_path / "original", model)
    document = scan_document(mwtool.scan_checkpoint(str(tmp_path / "original")))
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    four: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=settings, device_map={"": "cpu"}
    )
    four.save_pretrained(tmp_path / "four")
    quantized = load(str(tmp_path / "four"))
    found = corrections(str(tmp_path / "original"), quantized, columns_of(document, [0], 3))
    write_correction(found, str(tmp_path / "four"), tmp_path / "adapter")
    # loaded again: bitsandbytes repacks weights for the CPU as it computes, which PEFT's wrapper does not know
    wrapped = PeftModel.from_pretrained(load(str(tmp_path / "four")).base, str(tmp_path / "adapter"))
    module: Any = wrapped.get_submodule(f"base_model.model.{found[0].module}")
    columns = list(found[0].columns)
    unit = torch.eye(128, dtype=torch.bfloat16)
    with torch.no_grad():
        given, plain = module(unit).T.float(), module.base_layer(unit).T.float()
    wanted = model.get_submodule(found[0].module).weight.detach()[:, columns].float()
    off = [at for at in range(128) if at not in columns]
    assert torch.equal(given[:, off], plain[:, off])
    assert not torch.allclose(plain[:, columns], wanted, rtol=0.01)
    torch.testing.assert_close(given[:, columns], wanted, rtol=2**-7, atol=1e-6)  # bfloat16: two roundings of 2^-9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--event", "9"], "event 9 does not exist"),
        (["-k", "500"], "k is 500"),
        (["--quantized", "nowhere"], "nowhere"),
        (["--quantized", "demo"], "outputs of 192 in demo and of 32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    case: tuple[Path, dict[str, Any]], tmp_path: Path, arguments: list[str], words: str
) -> None:
    folder, _ = case
    given = ["--quantized", folder / "quantized", "-o", tmp_path / "columns", *arguments]
    assert words in run("export", folder / "scan.json", "--to", "peft", *given).fault
    assert not (tmp_path / "columns").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "peft"],
        ["--to", "peft", "--quantized", "demo", "-o", "columns", "--bits", "8"],
        ["--to", "awq", "--quantized", "demo"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    case: tuple[Path, dict[str, Any]], arguments: list[str]
) -> None:
    assert run("export", case[0] / "scan.json", *arguments).code == 2


def test_rows_of_a_routed_expert_are_refused() -> None:
    model = tiny.model("mixtral")
    tiny.plant(model)
    with pytest.raises(mwtool.errors.BadValue, match="expected a dense FFN"):
        columns_of(scan_document(mwtool.scan_model(model)), None, 1)
