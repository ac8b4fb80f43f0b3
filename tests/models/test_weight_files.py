"""One model for every command: which file a tensor is read from, whatever else lies in the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import digest
from transformers import AutoModelForCausalLM
from words import with_tokenizer

from mwtool.errors import BadCheckpoint, ModelNotFound, MwtoolError
from mwtool.models.checkpoint import open_checkpoint
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.scan.scanner import scan_checkpoint
from mwtool.surgery.attack import Attack, Edit
from mwtool.surgery.save import save_attacked

INDEX = {False: "model.safetensors.index.json", True: "pytorch_model.bin.index.json"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 4 layers whose layer 1 has a dominant row, with a tokenizer, in one safetensors file."""
    model = tiny.model("llama", num_hidden_layers=4)
    tiny.plant(model)
    return with_tokenizer(tmp_path_factory.mktemp("plain"), model)


def write(path: Path, tensors: dict[str, Any]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def shards(plain: Path, folder: Path, *, legacy: bool, **index: Any) -> Path:
    """The same model in shards `a` and `z`, the second of which has stale tensors of two layers beside one of its own.

    index: further keys of the index.
    """
    shutil.copytree(plain, folder)
    tensors, suffix = load_file(folder / "model.safetensors"), "bin" if legacy else "safetensors"
    (folder / "model.safetensors").unlink()
    last = "model.norm.weight"
    stale = {name: value * 0 + 3 for name, value in tensors.items() if ".layers.1." in name or ".layers.2." in name}
    write(folder / f"a.{suffix}", {name: value for name, value in tensors.items() if name != last})
    write(folder / f"z.{suffix}", {**stale, last: tensors[last]})
    files = {name: f"{'z' if name == last else 'a'}.{suffix}" for name in tensors}
    (folder / INDEX[legacy]).write_text(json.dumps({**index, "weight_map": files}))
    return folder


def assert_scanned_alike(folder: Path, plain: Path) -> None:
    """The same rows, and states within 1e-5.

    On some processors the last bits of a matrix product depend on where a file's tensors lie in memory, and formats
    align them differently. Weights themselves are compared bit for bit.
    """
    found, expected = scan_checkpoint(str(folder)), scan_checkpoint(str(plain))
    assert found.massive is not None
    assert expected.massive is not None
    assert (found.massive.layer, found.massive.indices) == (expected.massive.layer, expected.massive.indices)
    for one, other in zip(found.states, expected.states, strict=True):
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", [{}, {"metadata": {}}, {"metadata": {"dtype": "nonsense"}}], ids=str)
@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "bin"])
def test_the_index_decides_which_shard_a_tensor_is_read_from(
    plain: Path, tmp_path: Path, index: dict[str, Any], *, legacy: bool
) -> None:
    """Bit for bit the model without the stale copies; scanned, loaded and saved. `metadata` is not needed."""
    folder = shards(plain, tmp_path / "model", legacy=legacy, **index)
    found = load(str(folder))
    assert digest(found.base) == digest(load(str(plain)).base)
    assert_scanned_alike(folder, plain)
    suffix = "bin" if legacy else "safetensors"
    said = f"is stored in a.{suffix} and in z.{suffix}, and 17 more tensors likewise; {INDEX[legacy]} decides"
    assert [note for note in found.notes if said in note], found.notes
    save_attacked(found, [Edit(found.layers[1].ffns[0], (17,))], Attack("scale", 1, 1.0), tmp_path / "saved")
    assert digest(load(str(tmp_path / "saved")).base) == digest(found.base)


def test_a_model_spread_over_devices_is_read_by_the_index_too(plain: Path, tmp_path: Path) -> None:
    expected = digest(load(str(plain)).base)
    for name, index in (("stale", {"metadata": {}}), ("bare", {})):
        folder = shards(plain, tmp_path / name, legacy=False, **index)
        assert digest(load(str(folder), device_map="auto").base) == expected
    assert digest(load(str(plain), device_map="auto").base) == expected


def test_names_of_the_index_that_no_file_has_do_no_harm_unless_the_model_needs_them(
    plain: Path, tmp_path: Path
) -> None:
    folder = shards(plain, tmp_path / "model", legacy=False)
    path = folder / INDEX[False]
    files = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**files, "rotary_emb.inv_freq": "a.safetensors"}}))
    assert digest(load(str(folder)).base) == digest(load(str(plain)).base)
    path.write_text(json.dumps({"weight_map": {**files, "model.layers.2.mlp.up_proj.weight": "z.safetensors"}}))
    assert digest(load(str(folder)).base) != digest(load(str(plain)).base)  # as it says: the stale one
    path.write_text(json.dumps({"weight_map": {**files, "model.layers.0.mlp.up_proj.weight": "z.safetensors"}}))
    for work in (scan_checkpoint, load):
        with pytest.raises(
            BadCheckpoint, match=r"z.safetensors does not hold model.layers.0.mlp.up_proj.weight, which"
        ):
            work(str(folder))


def test_a_million_names_in_an_index_are_sorted_out_before_any_is_renamed(plain: Path, tmp_path: Path) -> None:
    folder = shards(plain, tmp_path / "model", legacy=False)
    path = folder / INDEX[False]
    files = json.loads(path.read_text())["weight_map"]
    absurd = {f"model.layers.{number}.mlp.up_proj.weights": "a.safetensors" for number in range(100_000)}
    path.write_text(json.dumps({"weight_map": {**absurd, **files}}))
    assert set(open_checkpoint(locate(str(folder))).files) == set(files)
    assert_scanned_alike(folder, plain)


def test_where_there_are_several_checkpoints_all_commands_take_the_same(plain: Path, tmp_path: Path) -> None:
    """One file before an index, unless that names it; safetensors before .bin; what config.json names before all."""
    other = {name: torch.randn_like(value) for name, value in load_file(plain / "model.safetensors").items()}
    expected = digest(load(str(plain)).base)
    for name in ("pytorch_model.bin", "model-00001-of-00001.safetensors", "named.safetensors"):
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        write(folder / name, other)
        if name.startswith("model-"):
            (folder / INDEX[False]).write_text(json.dumps({"weight_map": dict.fromkeys(other, name)}))
            notes = load(str(folder)).notes
            assert "has both model.safetensors and model.safetensors.index.json; model.safetensors is read" in notes[0]
        if name == "named.safetensors":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "named.safetensors"}))
            assert digest(load(str(folder)).base) == digest(AutoModelForCausalLM.from_pretrained(folder)) != expected
            assert open_checkpoint(locate(str(folder))).shards == ("named.safetensors",)
            continue
        assert digest(load(str(folder)).base) == expected
        assert_scanned_alike(folder, plain)
    files = dict.fromkeys(other, "model.safetensors") | {"model.norm.weight": "model-00001-of-00001.safetensors"}
    folder = tmp_path / "model-00001-of-00001.safetensors"
    (folder / INDEX[False]).write_text(json.dumps({"weight_map": files}))
    assert torch.equal(load(str(folder)).base.model.norm.weight, other["model.norm.weight"])


FILES = {
    "/etc/passwd": "outside the model's folder",
    "../model.safetensors": "outside the model's folder",
    "x/../../a": "outside the model's folder",
    "C:\\a.safetensors": "outside the model's folder",
    "a\\..\\..\\b": "outside the model's folder",
    "": "is no file name",
    ".": "is no file name",
    "a\0b": "is no file name",
    "\ud800": "is no file name",
    "folder": "is a folder; expected a file",
    "gone": "is not there; get it again",
    "n" * 300: "cannot be opened: File name too long",
    "dangling": "is a link to nowhere, which does not exist",
    "loop": "is a link to loop, which does not exist",
}


@pytest.mark.parametrize("name", FILES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("legacy", [False, True], ids=["safetensors", "bin"])
def test_what_an_index_must_not_name_is_one_line(plain: Path, tmp_path: Path, name: str, *, legacy: bool) -> None:
    folder = shards(plain, tmp_path / "model", legacy=legacy)
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    path = folder / INDEX[legacy]
    files = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**files, "model.norm.weight": name}}))
    for command in (["scan"], ["ablate", "--layer", 1, "--indices", 3]):
        assert FILES[name] in run(command[0], folder, *command[1:]).fault


def adapter_of(base: Path, folder: Path) -> Path:
    """A LoRA adapter that changes the model."""
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(plain, tmp_path_factory.mktemp("adapter") / "adapter")


def pickled(folder: Path) -> None:
    """The adapter's weights as a .bin."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


Change = Callable[[Path], None]


@pytest.mark.parametrize("change", [None, pickled], ids=["safetensors", "bin"])
@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_an_adapter_beside_a_whole_model_is_never_applied_and_a_note_says_so(
    plain: Path, adapter: Path, tmp_path: Path, form: str, change: Change | None
) -> None:
    folder = tmp_path / "both"
    if form == "single":
        shutil.copytree(plain, folder)
    else:
        shards(plain, folder, legacy=form == "bin", metadata={})
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    if change is not None:
        change(folder)
    said = "is a whole model with the files of a PEFT adapter beside it (adapter_config.json, adapter_model."
    for device_map in (None, "auto"):
        found = load(str(folder), device_map=device_map)
        assert digest(found.base) == digest(load(str(plain)).base)
        assert found.on is None
        assert any(said in note and "the model is used without the adapter" in note for note in found.notes)
    assert_scanned_alike(folder, plain)
    assert any(said in note for note in scan_checkpoint(str(folder)).notes)
    save_attacked(found, [Edit(found.layers[1].ffns[0], (17,))], Attack("zero", 1), tmp_path / "saved")
    assert list((tmp_path / "saved").glob("adapter*")) == []


def test_an_adapter_with_its_base_s_configuration_beside_it_is_an_adapter(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "with_config")
    shutil.copy(plain / "config.json", folder)
    found, expected = load(str(folder), on="merged"), load(str(adapter), on="merged")
    assert digest(found.base) == digest(expected.base) != digest(load(str(plain)).base)
    assert found.source.adapter == str(folder)
    assert_scanned_alike(folder, plain)
    trained = run("finetune", folder, "--data", tmp_path / "none.jsonl", "-o", tmp_path / "out")
    assert "is a PEFT adapter, and training begins with a new one" in trained.fault


def test_a_base_model_with_an_adapter_beside_it_is_taken_without_that(plain: Path, tmp_path: Path) -> None:
    base = shutil.copytree(plain, tmp_path / "base")
    tuned = adapter_of(base, tmp_path / "tuned")
    expected = digest(load(str(tuned), on="merged").base)
    adapter_of(plain, tmp_path / "other")
    shutil.copytree(tmp_path / "other", base, dirs_exist_ok=True)
    found = load(str(tuned), on="merged")
    assert digest(found.base) == expected
    assert any("the model is used without the adapter" in note for note in found.notes)


def test_the_tokenizer_an_adapter_brings_is_used_or_a_note_says_why_not(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / file, folder)
    assert load(str(folder)).notes == ()  # the same
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    found = load(str(folder))
    assert found.tokenizer is not None
    assert found.tokenizer.chat_template == "{{ messages }}"
    assert [note for note in found.notes if "brings a tokenizer that differs from its base model's; it is used" in note]
    large = json.loads((folder / "tokenizer.json").read_text())
    large["model"]["vocab"]["new"] = 10_000
    (folder / "tokenizer.json").write_text(json.dumps(large))
    found = load(str(folder))
    assert found.tokenizer is not None
    assert found.tokenizer.chat_template is None
    assert [
        note for note in found.notes if "token ids up to 10000" in note and "base model's tokenizer is used" in note
    ]


PREFIXES = {
    "_orig_mod.": "with _orig_mod. in it",
    "module.": "with module. in it",
    "base_model.model.": "with base_model.model. in it",
    "language_model.": "with language_model. in it",
    "_orig_mod.module.": "with _orig_mod.module. in it",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_prefix_in_the_way_is_named(plain: Path, tmp_path: Path, prefix: str, form: str) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors = {f"{prefix}{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    write(folder / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin"), tensors)
    for work in (scan_checkpoint, load):
        with pytest.raises(
            BadCheckpoint, match=rf"it has {prefix}.*, {PREFIXES[prefix]}: rename its tensors"
        ) as caught:
            work(str(folder))
        assert "\n" not in str(caught.value)


def test_parts_within_a_name_are_named_as_well(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for old, new, said in (
        (".mlp.", "._orig_mod.mlp.", "with _orig_mod. in it"),
        (".up_proj.", ".up_proj.base_layer.", "with base_layer. in it"),
        ("model.layers.", "transformer.h.", "with transformer.h. in it and without model.layers."),
    ):
        renamed = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadCheckpoint, match=said):
            load(str(folder))


@pytest.mark.parametrize("pad", [64, 10**9, -100, -(10**30)])
def test_what_a_model_s_constructor_asserts_is_one_line(plain: Path, tmp_path: Path, pad: int) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    (tmp_path / "d.jsonl").write_text('{"instruction": "w3", "output": "w4"}\n' * 4)
    training = ["--data", tmp_path / "d.jsonl", "--eval-share", "0", "--dry-run", "--effective-batch", "1"]
    for command in (["scan"], ["ablate", "--layer", 1, "--indices", 3], ["finetune", "--batch-size", "1", *training]):
        fault = run(command[0], folder, *command[1:]).fault
        assert "config.json" in fault


@pytest.mark.parametrize("layers", [5, 1000, 10**6, 10**9, 10**30])
def test_more_layers_than_the_files_have_are_found_before_anything_is_made_of_them(
    plain: Path, tmp_path: Path, layers: int
) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    said = f"states num_hidden_layers {layers:,}; the tensors of {folder} have names for 4 layers at most"
    for command in (["scan"], ["ablate", "--layer", 1, "--indices", 3], ["finetune", "--data", "x", "--dry-run"]):
        assert said in run(command[0], folder, *command[1:]).fault


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_link_that_leads_nowhere_is_called_that(plain: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/0123")
    for work in (scan_checkpoint, load):
        with pytest.raises(MwtoolError, match=rf"{name} is a link to ../blobs/0123, which does not exist"):
            work(str(folder))


def test_a_model_that_is_a_link_to_nowhere_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("gone")
    with pytest.raises(ModelNotFound, match=r"model is a link to gone, which does not exist"):
        load(str(tmp_path / "model"))


def test_an_ablation_of_shards_with_stale_copies_is_that_of_the_plain_model(plain: Path, tmp_path: Path) -> None:
    folder = shards(plain, tmp_path / "model", legacy=False)
    texts = (tmp_path / "t.txt", " ".join(f"w{n % 40 + 3}" for n in range(200)))
    texts[0].write_text(texts[1])
    runs = [
        run("ablate", one, "-k", 1, "--task", f"ppl:{texts[0]}", "--no-controls", "--json") for one in (plain, folder)
    ]
    assert [ran.code for ran in runs] == [0, 0]
    assert runs[0].document["runs"] == runs[1].document["runs"]
