"""An attacked checkpoint is the original but for the attacked rows, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from filelock import lock_descriptor
from safetensors import safe_open
from torch import Tensor, nn

from mwtool.errors import BadValue, OutputError, UnsupportedModel
from mwtool.models.load import Loaded, load
from mwtool.models.rewrite import save_merged
from mwtool.surgery.attack import Attack, Edit, edited, places
from mwtool.surgery.save import save_attacked

IDS = torch.tensor([[tiny.BOS, 5, 9, 3, 17, 22, 40, 8]])
ZERO = Attack("zero", 2)
ROWS = [1, 4]


def original(folder: Path, model_type: str, **options: Any) -> Loaded:
    tiny.saved(folder, tiny.model(model_type, torch.bfloat16, num_hidden_layers=2), **options)
    return load(str(folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    """By file and name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            found |= {f"{path.name} {name}": handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it is no mapping
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("model_type", "attack"),
    [
        *((kind, ZERO) for kind in tiny.ALL_TYPES),
        ("phi3", Attack("retain", 2)),
        ("mixtral", Attack("scale", 2, -0.5)),
    ],
    ids=str,
)
def test_the_saved_model_is_the_attacked_one_and_all_else_is_bit_identical(
    tmp_path: Path, model_type: str, attack: Attack
) -> None:
    loaded = original(tmp_path / "model", model_type)
    ffn = loaded.layers[1].ffns[0]
    save_attacked(loaded, [Edit(ffn, tuple(ROWS))], attack, tmp_path / "saved")
    before, after = tensors(tmp_path / "model"), tensors(tmp_path / "saved")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert list(before) == list(after)
    assert 1 <= len(changed) <= len(places(ffn))
    again = tiny.opened(tmp_path / "saved")
    with edited(loaded.base, ffn, ROWS, attack):
        expected, inside = loaded.base.state_dict(), logits(loaded.base)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        assert torch.equal(logits(again), inside)


def test_a_tensor_that_two_parameters_share_stays_one(tmp_path: Path) -> None:
    made = tiny.model("llama", torch.bfloat16, num_hidden_layers=2, tie_word_embeddings=True)
    loaded = load(str(tiny.saved(tmp_path / "model", made)))
    save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    assert tensors(tmp_path / "saved").keys() == tensors(tmp_path / "model").keys()
    again = tiny.opened(tmp_path / "saved")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, made.get_input_embeddings().weight)


def test_shards_configuration_and_tokenizer_are_those_of_the_original(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.saved(folder, tiny.model("llama", num_hidden_layers=2), max_shard_size="30KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("the original's card")
    loaded = load(str(folder))
    save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    names = {path.name for path in folder.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names - {"README.md"} | {"mwtool.json"}
    for name in names - {"README.md"}:
        if not name.endswith((".safetensors", "templates")):
            assert (folder / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert (tmp_path / "saved" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    record = json.loads((tmp_path / "saved" / "mwtool.json").read_text())
    assert (record["attack"], record["module"], record["indices"]) == ("zero", "model.layers.1.mlp", ROWS)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.filterwarnings("ignore:.*torch.load.*weights_only.*:FutureWarning")  # transformers reads .bin so
def test_a_legacy_checkpoint_becomes_a_safetensors_one(tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load(str(folder))
    ffn = loaded.layers[1].ffns[0]
    save_attacked(loaded, [Edit(ffn, tuple(ROWS))], ZERO, tmp_path / "saved")
    with edited(loaded.base, ffn, ROWS, ZERO):
        assert torch.equal(logits(tiny.opened(tmp_path / "saved")), logits(loaded.base))


@pytest.mark.parametrize("on", ["base", "merged"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_merged_into_the_saved_model(tmp_path: Path, dora: bool, on: Any) -> None:  # noqa: FBT001 - a parameter
    from peft import LoraConfig, get_peft_model

    base = tiny.model("llama", num_hidden_layers=2)
    tiny.saved(tmp_path / "model", base, max_shard_size="30KB")
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(tiny.opened(tmp_path / "model"), LoraConfig(r=2, target_modules=targets, use_dora=dora))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name and "gate" not in name:  # a fresh gate: under DoRA its zeroed rows have no norm
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    loaded = load(str(tmp_path / "adapter"), on=on)
    ffn = loaded.layers[1].ffns[0]
    save_attacked(loaded, [Edit(ffn, tuple(ROWS))], ZERO, tmp_path / "saved")
    found = logits(tiny.opened(tmp_path / "saved"))
    with edited(loaded.base, ffn, ROWS, ZERO):
        expected = logits(loaded.model)
    # the adapter's product is added to the weight or to the output: float32 rounds them apart
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert tensors(tmp_path / "saved").keys() == tensors(tmp_path / "model").keys()
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from mwtool.models.load import load
from mwtool.surgery.save import save_attacked
from mwtool.surgery.attack import Attack, Edit

loaded = load(sys.argv[1])
target = Path(sys.argv[2])
def save(last):
    done = 0
    def count(event, args):
        nonlocal done
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "os.fsync"):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple([1, 4]))], Attack("zero", 2), target)

states = []
for last in range(1, 1000):
    child = os.fork()
    if not child:
        save(last)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    states.append(sorted(path.name for path in target.iterdir()) if target.exists() else None)
    if os.waitstatus_to_exitcode(status) == 0 or target.exists():
        break
print(len(states), [state for state in states if state is not None])
"""


def test_killed_at_any_file_operation_it_leaves_nothing_or_the_whole(tmp_path: Path) -> None:
    """A child is killed (SIGKILL) at its first file operation, the next at its second, until one is done."""
    original(tmp_path / "model", "llama", max_shard_size="30KB")
    arguments = [str(tmp_path / "model"), str(tmp_path / "saved")]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, capture_output=True, text=True)
    kills = int(ran.stdout.split()[0])
    assert kills > 15
    whole = {path.name for path in (tmp_path / "model").iterdir()} | {"mwtool.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == whole
    assert tiny.opened(tmp_path / "saved").model.layers[1].mlp.up_proj.weight[ROWS].any().item() is False


def test_what_a_killed_process_left_is_cleared_and_another_one_s_work_is_not(tmp_path: Path) -> None:
    loaded = original(tmp_path / "model", "llama")
    temporary = tmp_path / ".saved.incomplete"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "model.safetensors").write_text("half")
    holder = os.open(tmp_path / ".saved.incomplete.lock", os.O_RDWR | os.O_CREAT)
    assert lock_descriptor(holder)
    with pytest.raises(OutputError, match="is being written by another process"):
        save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    assert (temporary / "model.safetensors").read_text() == "half"
    os.close(holder)  # as the system does for a process that is killed
    save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    assert not tiny.opened(tmp_path / "saved").model.layers[1].mlp.up_proj.weight[ROWS].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # peft says what may go wrong, as here
@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({"modules_to_save": ["lm_head"]}, "base"),
        ({"modules_to_save": ["lm_head"]}, "merged"),
        ({"target_modules": ["up_proj", "lm_head"]}, "base"),  # merged it is added to both
    ],
    ids=str,
)
def test_an_adapter_that_unties_what_is_tied_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], on: Any
) -> None:
    """The checkpoint has one tensor for embedding and head; saved there, the head would lose what it learned."""
    from peft import LoraConfig, get_peft_model

    tiny.saved(tmp_path / "model", tiny.model("llama", num_hidden_layers=2, tie_word_embeddings=True))
    peft = get_peft_model(
        tiny.opened(tmp_path / "model"), LoraConfig(r=2, **{"target_modules": ["up_proj"], **options})
    )
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = load(str(tmp_path / "adapter"), on=on)
    with pytest.raises(UnsupportedModel, match=r"lm_head.weight or model.embed_tokens.weight, .* stored once"):
        save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    if on == "merged":
        with pytest.raises(UnsupportedModel, match="tied and stored once"):
            save_merged(loaded, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    loaded = original(tmp_path / "model", "llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights are larger
    try:
        with pytest.raises(OutputError, match=r"saved could not be written: .*; no partial folder is left") as caught:
            save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_in_it_is_never_touched(tmp_path: Path) -> None:
    loaded = original(tmp_path / "model", "llama")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["mine"]


def test_fixed_values_are_refused_because_no_weight_holds_them(tmp_path: Path) -> None:
    loaded = original(tmp_path / "model", "llama")
    with pytest.raises(BadValue, match="mean fixes intermediate values"):
        save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], Attack("mean", 2), tmp_path / "saved")


def test_a_quantized_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional library")
    from transformers import BitsAndBytesConfig

    tiny.saved(tmp_path / "model", tiny.model("llama", num_hidden_layers=2, hidden_size=64, head_dim=16))
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    loaded = load(str(tmp_path / "model"), model_options=options)
    with pytest.raises(UnsupportedModel, match="is quantized, so changed rows cannot be saved"):
        save_attacked(loaded, [Edit(loaded.layers[1].ffns[0], tuple(ROWS))], ZERO, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
