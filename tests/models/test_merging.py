"""A streamed model with an adapter merged into it has the states of the one that PEFT merges whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run, run_apart
from peft import LoraConfig, PeftModel, get_peft_model
from words import planted_folder, with_tokenizer

from mwtool.errors import BadCheckpoint, UnsupportedModel
from mwtool.models.locate import locate
from mwtool.scan.scanner import Scan, scan_checkpoint, scan_model
from mwtool.scan.settings import Settings
from mwtool.scan.subject import streamed

SETTINGS = Settings(bos="1")


def adapter(folder: Path, base: Path, **options: Any) -> Path:
    """An adapter of random weights."""
    torch.manual_seed(1)
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    made: Any = get_peft_model(tiny.opened(base), LoraConfig(**given, task_type="CAUSAL_LM"))
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def assert_alike(one: Scan, other: Scan) -> None:
    """The last bit of a product depends on where in memory a matrix lies, which merging moves."""
    for ours, theirs in zip(one.states, other.states, strict=True):
        for name in ("hidden", "intermediate", "added"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
    rows = [found.massive and (found.massive.layer, found.massive.indices[0]) for found in (one, other)]
    assert rows[0] == rows[1]
    assert one.parameters == other.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_the_weights_of_each_layer_are_bit_for_bit_those_that_peft_merges(
    tmp_path: Path, model_type: str, dtype: torch.dtype, *, dora: bool
) -> None:
    base = tiny.saved(tmp_path / "base", tiny.model(model_type, dtype, num_hidden_layers=2))
    folder = adapter(tmp_path / "adapter", base, use_dora=dora, fan_in_fan_out=model_type == "gpt2")
    before = dict(tiny.opened(base).named_parameters())
    wrapped: Any = PeftModel.from_pretrained(tiny.opened(base), folder)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    stream = streamed(locate(str(folder)), SETTINGS, on="merged").stream
    assert stream is not None
    changed = 0
    for _ in range(2):  # read again, not added to again
        for path in (one.path for one in stream.layers):
            with stream.layer(path) as layer:
                for name, weight in layer.named_parameters():
                    assert torch.equal(weight, merged[f"{path}.{name}"])
                    changed += not torch.equal(weight, before[f"{path}.{name}"])
    assert changed >= 16


@pytest.mark.parametrize("model_type", ["gemma2", "opt"])
def test_the_scan_is_that_of_the_model_that_peft_merges(tmp_path: Path, model_type: str) -> None:
    made = tiny.model(model_type, num_hidden_layers=4)
    tiny.plant(made)
    base = tiny.saved(tmp_path / "base", made)
    folder = adapter(tmp_path / "adapter", base, use_dora=True)
    wrapped: Any = PeftModel.from_pretrained(tiny.opened(base), folder)
    whole = scan_model(wrapped.merge_and_unload(), settings=SETTINGS)
    assert_alike(scan_checkpoint(str(folder), SETTINGS, on="merged"), whole)
    plain = scan_checkpoint(str(folder), SETTINGS)
    assert not torch.allclose(plain.states[1].hidden, whole.states[1].hidden, rtol=1e-2)
    assert_alike(plain, scan_checkpoint(str(base), SETTINGS))


def test_a_new_adapter_changes_nothing_though_a_scan_leaves_queries_and_keys_out(tmp_path: Path) -> None:
    made = tiny.model("llama", num_hidden_layers=4)
    tiny.plant(made)
    base = tiny.saved(tmp_path / "base", made)
    folder = adapter(tmp_path / "adapter", base, use_dora=True, init_lora_weights=True)
    assert_alike(scan_checkpoint(str(folder), SETTINGS, on="merged"), scan_checkpoint(str(base), SETTINGS))


def test_a_checkpoint_in_bin_files_which_stay_open_is_not_merged_twice(tmp_path: Path) -> None:
    made = tiny.model("llama", num_hidden_layers=4)
    tiny.plant(made)
    base = tiny.saved(tmp_path / "base", made)
    folder = adapter(tmp_path / "adapter", base)
    first = scan_checkpoint(str(folder), SETTINGS, on="merged")
    (base / "model.safetensors").unlink()
    torch.save(made.state_dict(), base / "pytorch_model.bin")
    assert_alike(scan_checkpoint(str(folder), SETTINGS, on="merged"), first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"modules_to_save": ["lm_head"], "target_modules": ["up_proj"]},
            r"\(modules_to_save\) cannot be merged a layer",
        ),
        ({"target_modules": ["embed_tokens"]}, "changes model.embed_tokens, a Embedding, and cannot be merged a layer"),
    ],
)
def test_an_adapter_that_changes_more_than_linear_layers_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    base = tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=2))
    folder = adapter(tmp_path / "adapter", base, **options)
    with pytest.raises(UnsupportedModel, match=said):
        scan_checkpoint(str(folder), SETTINGS, on="merged")


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=2))
    folder = adapter(tmp_path / "adapter", base)
    tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=2, intermediate_size=48))
    with pytest.raises(BadCheckpoint, match=r"cannot be applied: .*size mismatch"):
        scan_checkpoint(str(folder), SETTINGS, on="merged")


def test_the_command_scans_and_checks_the_sum_as_if_it_had_been_merged_and_saved(tmp_path: Path) -> None:
    base = planted_folder(tmp_path / "base", num_hidden_layers=4)
    folder = adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"])
    wrapped: Any = PeftModel.from_pretrained(tiny.opened(base), folder)
    saved = with_tokenizer(tmp_path / "saved", wrapped.merge_and_unload())
    options = ["--json", "--check", base / "text.txt", "--window", 32, "--limit", 2, "-k", 2]
    found, expected, below = (
        run("scan", *one, *options) for one in ([folder, "--on", "merged"], [saved], [folder, "--on", "base"])
    )
    ratios = [
        [part[name]["ratio"] for part in ran.document["check"]["events"] for name in ("zero", "retain")]
        for ran in (found, expected, below)
    ]
    assert ratios[0] == pytest.approx(ratios[1], rel=5e-6)  # as in `assert_alike`
    assert ratios[0] != pytest.approx(ratios[2], rel=5e-5)
    assert found.document["massive"]["indices"] == expected.document["massive"]["indices"]
    assert any("was merged into its base model" in note for note in found.document["notes"])
    assert any("--on merged scans the sum" in note for note in below.document["notes"])
    assert "--on merged is ignored" in run("scan", base, "--on", "merged").err
    alone = run_apart("scan", folder, "--on", "merged", "--json")  # where libraries are imported anew
    assert [line.partition(" ")[0] for line in alone.err.splitlines()] == ["note:"]
