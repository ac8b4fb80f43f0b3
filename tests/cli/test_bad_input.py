"""Every bad input of `mwtool scan`: exit status 1, one line naming the culprit, nothing on stdout, nothing written."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from safetensors.torch import load_file, save_file

UP = "model.layers.3.mlp.up_proj.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 layers in one file and, in folder `sharded`, in 9; its massive weights are in layer 1."""
    model = tiny.model("llama", torch.bfloat16)
    tiny.plant(model)
    folder = tmp_path_factory.mktemp("intact")
    tiny.saved(folder / "sharded", model, max_shard_size="20KB")
    return tiny.saved(folder / "single", model).parent


@pytest.fixture
def single(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact / "single", tmp_path / "model"))


@pytest.fixture
def sharded(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact / "sharded", tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a key set to `...` goes."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def config(**changes: Any) -> Damage:
    return lambda folder: change(folder / "config.json", **changes)


def content(file: str, text: bytes, instead_of: str = "nothing") -> Damage:
    def damage(folder: Path) -> None:
        (folder / instead_of).unlink(missing_ok=True)
        (folder / file).write_bytes(text)

    return damage


def both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def cut(file: str, end: int) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:end])

    return damage


def tensor(name: str, new: torch.Tensor | None) -> Damage:
    """Replace a tensor, or leave it out."""

    def damage(folder: Path) -> None:
        tensors = {**load_file(folder / "model.safetensors"), name: new}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_one(value: float, *shape: int) -> torch.Tensor:
    whole = torch.zeros(shape, dtype=torch.bfloat16)
    whole.view(-1)[-1] = value
    return whole


def legacy(write: bytes | object) -> Damage:
    """Put a `.bin` file of these bytes, or of this object, in the place of the weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(write, bytes):
            (folder / "pytorch_model.bin").write_bytes(write)
        else:
            torch.save(write, folder / "pytorch_model.bin")

    return damage


def legacy_with(name: str, new: torch.Tensor) -> Damage:
    def damage(folder: Path) -> None:
        legacy({**load_file(folder / "model.safetensors"), name: new})(folder)

    return damage


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    # config.json
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    "config cut short": (cut("config.json", 40), ["config.json cannot be read"]),
    "config is a list": (content("config.json", b"[]"), ["config.json holds a list"]),
    "config is not text": (content("config.json", b"\xff\xfe"), ["config.json cannot be read"]),
    "no model type": (config(model_type=...), ["has no model_type"]),
    "a value of another type": (config(hidden_size="wide"), ["config.json", "hidden_size", "expected int"]),
    "heads that do not divide": (config(num_attention_heads=3), ["config.json", "attention heads (3)"]),
    "no heads": (config(num_attention_heads=0), ["config.json", "ZeroDivisionError"]),
    "unknown activation": (config(hidden_act="nope"), ["config.json", "'nope'"]),
    "unknown dtype": (config(dtype="float99"), ["config.json", "float99"]),
    "no layers": (config(num_hidden_layers=0), ["0 decoder layers"]),
    "quantized, no one knows how": (config(quantization_config="yes"), ["config.json cannot be used"]),
    # what kind of model it is
    "unknown model type": (config(model_type="zeppelin"), ["'zeppelin'", "installed ones", "adapters new"]),
    "known type without adapter": (
        config(model_type="cwm", architectures=["CwmForCausalLM"]),
        ["'cwm'", "installed ones", "adapters new"],
    ),
    "own code": (config(model_type="mine", auto_map={"AutoConfig": "c.C"}), ["--trust-remote-code"]),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        ["LlamaForSequenceClassification", "causal"],
    ),
    "a damaged GGUF file": (
        both(content("m.gguf", b"GGUF", "model.safetensors"), lambda folder: (folder / "config.json").unlink()),
        ["m.gguf ends within the version, at byte 4", "truncated"],
    ),
    "a damaged GGUF file, with a configuration": (
        content("model-Q4_K_M.gguf", b"GGUF", "model.safetensors"),
        ["model-Q4_K_M.gguf ends within the version, at byte 4", "truncated"],
    ),
    "a causal type with an encoder": (
        config(model_type="bart", is_encoder_decoder=True, architectures=["BartForConditionalGeneration"]),
        ["is a bart with an encoder", "not a causal language model"],
    ),
    "an encoder": (config(model_type="clip"), ["is a clip", "not a causal language model"]),
    "a sequence-to-sequence model": (config(model_type="t5"), ["is a t5", "not a causal language model"]),
    # quantization that is not undone
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ["says gptq", "no tensor is packed so"],
    ),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), ["says awq", "no tensor is packed so"]),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["says bitsandbytes", "no tensor is packed so"],
    ),
    # weight files
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["has no weights", "model.safetensors"]),
    "empty safetensors": (cut("model.safetensors", 0), ["model.safetensors (0 bytes)", "cut short"]),
    "safetensors cut in its header": (cut("model.safetensors", 100), ["model.safetensors (100 bytes)", "cut short"]),
    "safetensors cut in a tensor": (cut("model.safetensors", -1), ["model.safetensors", "cut short"]),
    "a pointer in place of a file": (
        content("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ["model.safetensors", "git lfs pull"],
    ),
    "a legacy file of another kind": (legacy(b"garbage" * 99), ["pytorch_model.bin (693 bytes)"]),
    "a legacy file cut short": (legacy(pickled({"x": torch.ones(999)})[:2000]), ["pytorch_model.bin (2,000 bytes)"]),
    "a legacy file with code in it": (legacy({"x": Path}), ["pytorch_model.bin", "more than tensors"]),
    "a legacy file of something else": (legacy([1]), ["pytorch_model.bin", "holds a list"]),
    "a legacy index naming a missing file": (
        content("pytorch_model.bin.index.json", b'{"weight_map": {"x": "pytorch_model-9.bin"}}', "model.safetensors"),
        ["pytorch_model.bin.index.json", "pytorch_model-9.bin", "not there"],
    ),
    # tensors
    "missing tensor": (tensor(UP, None), ["no tensor for", UP]),
    "missing embedding": (tensor("model.embed_tokens.weight", None), ["no tensor for model.embed_tokens.weight"]),
    "misshapen tensor": (tensor(UP, torch.zeros(63, 32)), [UP, "(63, 32)", "(64, 32)"]),
    "misshapen norm": (
        tensor("model.layers.0.input_layernorm.weight", torch.zeros(31)),
        ["model.layers.0.input_layernorm.weight", "(31,)", "(32,)"],
    ),
    "misshapen embedding": (
        tensor("model.embed_tokens.weight", torch.zeros(64, 31)),
        ["model.embed_tokens.weight", "(64, 31)", "(64, 32)"],
    ),
    "config of another size": (config(intermediate_size=128), ["layers.0.mlp.down_proj", "(32, 64)", "(32, 128)"]),
    "whole numbers": (tensor(UP, torch.ones(64, 32, dtype=torch.int8)), [UP, "I8", "floating point"]),
    "whole numbers for bos": (
        tensor("model.embed_tokens.weight", torch.ones(64, 32, dtype=torch.int32)),
        ["model.embed_tokens.weight", "I32", "floating point"],
    ),
    "whole numbers in a legacy file": (legacy_with(UP, torch.ones(64, 32, dtype=torch.uint8)), [UP, "uint8"]),
    "one NaN": (tensor(UP, with_one(float("nan"), 64, 32)), [UP, "NaN"]),
    "one inf": (tensor(UP, with_one(float("-inf"), 64, 32)), [UP, "inf"]),
    "NaN for bos": (
        tensor("model.embed_tokens.weight", torch.full((64, 32), float("nan"))),
        ["model.embed_tokens.weight", "NaN"],
    ),
    # the token
    "no bos": (config(bos_token_id=None), ["names a bos", "--bos TOKEN"]),
    "bos outside the vocabulary": (config(bos_token_id=9999), ["9999", "vocabulary of 64"]),
    "tokenizer without words": (
        both(
            content("tokenizer.model", b"xx"),
            content("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}'),
        ),
        ["tokenizer", "no vocabulary"],
    ),
    "tokenizer cut short": (content("tokenizer.json", b"{"), ["tokenizer", "cannot be read"]),
    "tokenizer of nothing": (content("tokenizer.json", b"{}"), ["tokenizer", "cannot be read"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_one_line_naming_the_damage(single: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(single)
    fault = run("scan", single, "--json").fault
    assert [word for word in words if word not in fault] == [], fault


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_that_is_loaded_whole_is_one_line_too(single: Path, name: str) -> None:
    """With the words of a scan where the same file or value is at fault; the rest need a tokenizer or a library."""
    damage, words = DAMAGES[name]
    damage(single)
    ran = run("ablate", single, "--layer", 1, "--indices", 3)
    assert (ran.code, ran.out) == (1, "")
    *logged, fault = ran.err.splitlines()
    assert fault.startswith("error: ")
    assert [line for line in logged if not line.startswith("Failed to load CPU gemm")] == []  # bitsandbytes
    otherwise = ("has no tokenizer", "has no tensor", "config.json makes", "cannot be loaded")
    assert all(word in fault for word in words) or any(word in fault for word in otherwise), fault


def index(**changes: Any) -> Damage:
    return lambda folder: change(folder / "model.safetensors.index.json", **changes)


def placed(folder: Path, name: str, file: str | None) -> None:
    """Have the index place a tensor in another file, or nowhere."""
    path = folder / "model.safetensors.index.json"
    files = {**json.loads(path.read_text())["weight_map"], name: file}
    change(path, weight_map={name: file for name, file in files.items() if file is not None})


SHARDS: dict[str, tuple[Damage, list[str]]] = {
    "missing shard": (
        lambda folder: (folder / "model-00003-of-00009.safetensors").unlink(),
        ["model.safetensors.index.json", "model-00003-of-00009.safetensors", "not there"],
    ),
    "shard cut short": (
        cut("model-00003-of-00009.safetensors", -100),
        ["model-00003-of-00009.safetensors", "cut short"],
    ),
    "damaged index": (cut("model.safetensors.index.json", 30), ["model.safetensors.index.json cannot be read"]),
    "index of nothing": (index(weight_map={}), ["model.safetensors.index.json", "weight_map"]),
    "index of numbers": (index(weight_map={UP: 3}), ["model.safetensors.index.json", "weight_map"]),
    "index that lacks a tensor": (lambda folder: placed(folder, UP, None), ["no tensor for", UP]),
    "index that places it wrongly": (
        lambda folder: placed(folder, UP, "model-00009-of-00009.safetensors"),
        ["model-00009-of-00009.safetensors", UP],
    ),
    "index that leads elsewhere": (
        lambda folder: placed(folder, UP, "../other.safetensors"),
        ["../other.safetensors", "outside"],
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_damaged_shard_or_index_is_one_line_naming_it(sharded: Path, name: str) -> None:
    damage, words = SHARDS[name]
    damage(sharded)
    fault = run("scan", sharded).fault
    assert [word for word in words if word not in fault] == [], fault
    if not name.startswith("index that lacks") and not name.startswith("index that places"):  # whole files are loaded
        fault = run("ablate", sharded).fault
        assert [word for word in words if word not in fault] == [], fault


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", ["no such folder: ./nowhere"]),
        ("/no/where", ["no such folder: /no/where"]),
        ("one/two/three", ["no such folder: one/two/three"]),
        ("~nobody/model", ["no such folder: ~nobody/model"]),
        ("not an id!", ["'not an id!'", "neither a folder nor a Hub id"]),
        ("", ["''", "neither a folder nor a Hub id"]),
        (".", [". has no config.json"]),
        ("file.txt", ["file.txt is a file", "folder"]),
    ],
)
def test_a_model_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    fault = run("scan", model).fault
    assert [word for word in words if word not in fault] == [], fault


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-k", "65"], ["k is 65", "64"]),
        (["--bos", "64"], ["64 (given)", "vocabulary of 64"]),
        (["--bos", "-3"], ["-3 (given)", "vocabulary of 64"]),
        (["--bos", "9" * 5000], ["--bos", "give an id"]),
        (["--bos", "<s>"], ["'<s>'", "no tokenizer", "give an id"]),
        (["--bos", "always"], ["the tokenizer names no bos"]),
        (["--bos", "never"], ["--bos never needs a tokenizer"]),
        (["--layers", "0-8"], ["--layers ends at layer 8", "layers 0 to 7"]),
        (["--layer", "8"], ["layer 8 does not exist", "layers 0 to 7"]),
        (["--layers", "0-3", "--layer", "5"], ["layer 5 is behind the end of the walk, layer 3"]),
        (["--event", "99"], ["there is no event 99; the scan found"]),
        (["--layer", "1", "--indices", "64"], ["row 64 does not exist", "rows 0 to 63"]),
        (["--layer", "1", "--expert", "0"], ["one dense feed-forward network; there is no expert 0"]),
        (["--device", "abacus"], ["'abacus'", "cpu"]),
        (["--device", "meta"], ["'meta'", "cpu"]),
    ],
)
def test_an_option_the_model_does_not_allow_is_named(intact: Path, arguments: list[str], words: list[str]) -> None:
    fault = run("scan", intact / "single", *arguments).fault
    assert [word for word in words if word not in fault] == [], fault


def test_k_is_checked_before_any_weight_is_read(sharded: Path) -> None:
    for shard in sharded.glob("*.safetensors"):
        shard.write_bytes(b"")
    assert "k is 65" in run("scan", sharded, "-k", 65).fault
    assert "cut short" in run("scan", sharded, "-k", 64).fault


def test_damage_behind_the_end_of_a_partial_walk_is_no_obstacle(sharded: Path) -> None:
    (sharded / "model-00009-of-00009.safetensors").write_bytes(b"")
    assert run("scan", sharded, "--layers", "0-5").code == 0
    assert "model-00009-of-00009.safetensors" in run("scan", sharded).fault


def test_an_adapter_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    for base, words in ((None, "names no base_model"), ("./gone", "no such folder: ./gone"), (str(tmp_path), "too")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        fault = run("scan", tmp_path).fault
        assert str(tmp_path) in fault
        assert words in fault


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", ["is a folder"]),
        ("none/x.json", ["none does not exist"]),
        pytest.param(
            "/dev/full",
            ["/dev/full", "No space left"],
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full"),
        ),
    ],
)
def test_an_output_that_cannot_be_written_is_named(intact: Path, tmp_path: Path, output: str, words: list[str]) -> None:
    fault = run("scan", intact / "single", "-o", tmp_path / output).fault
    assert [word for word in words if word not in fault] == [], fault
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named_before_the_scan(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    fault = run("scan", "./nowhere", "-o", tmp_path / "x.json").fault
    assert str(tmp_path / "x.json") in fault
    assert "permission" in fault


def test_a_disk_that_fills_up_leaves_the_former_file_and_nothing_else(intact: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: the write fails in its middle."""
    output = tmp_path / "x.json"
    output.write_text("former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        fault = run("scan", intact / "single", "-o", output).fault
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(output) in fault
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert output.read_text() == "former"
