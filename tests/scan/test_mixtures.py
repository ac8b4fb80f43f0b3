"""Commands on one expert, or on gate and up fused in one parameter, as on a dense FFN."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from words import with_tokenizer

from mwtool import MacDrop, scan_checkpoint, scan_model
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers
from mwtool.models.checkpoint import Checkpoint
from mwtool.models.key_mapping import Rows

ROW, LAYER = 11, 3
KINDS = ["deepseek_v3", "gpt_oss", "mixtral", "phi3", "qwen2_moe"]
"""A shared expert beside; transposed, interleaved and biased; fused; fused and dense; dense among mixtures."""


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny.model(request.param)
    tiny.plant(model, layer=LAYER, row=ROW)
    return with_tokenizer(tmp_path / request.param, model)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every tensor that is opened in a checkpoint, as often as it is; in brackets the entries taken."""
    opened: list[str] = []
    tensors, take = Checkpoint.tensors, Rows.__getitem__

    def noting(self: Checkpoint, names: Iterable[str]) -> Any:
        opened.extend(names := list(names))
        return tensors(self, names)

    def noting_rows(self: Rows, index: Any) -> torch.Tensor:
        opened.append(f"{self.name}{list(self.rows)}")
        return take(self, index)

    monkeypatch.setattr(Checkpoint, "tensors", noting)
    monkeypatch.setattr(Rows, "__getitem__", noting_rows)
    return opened


def test_a_scan_reads_a_layer_then_the_experts_chosen_and_no_others(tmp_path: Path, reads: list[str]) -> None:
    """Mixtral: each expert is three tensors of its own, under other names than in memory."""
    model = tiny.model("mixtral")
    tiny.plant(model, layer=LAYER, row=ROW)
    saved = tiny.saved(tmp_path, model)
    stored = set(load_file(saved / "model.safetensors"))
    found = scan_checkpoint(str(saved))
    assert not any("experts." in name for name in model.state_dict() if name in stored)
    for state in found.states:
        block = f"model.layers.{state.layer}.block_sparse_moe"
        chosen = {part.ffn.expert for part in state.parts}
        expected = {f"{block}.experts.{expert}.{matrix}.weight" for expert in chosen for matrix in ("w1", "w2", "w3")}
        assert {name for name in reads if name.startswith(f"{block}.experts.")} == expected
        assert reads.index(f"{block}.gate.weight") < min(map(reads.index, expected))
    assert "lm_head.weight" not in reads


def test_of_a_tensor_that_holds_all_experts_the_entries_of_those_chosen_are_read(
    tmp_path: Path, reads: list[str]
) -> None:
    model = tiny.model("gpt_oss")
    tiny.plant(model, layer=LAYER, row=ROW)
    found = scan_checkpoint(str(tiny.saved(tmp_path, model)))
    for state in found.states:
        name = f"model.layers.{state.layer}.mlp.experts.gate_up_proj"
        chosen = sorted(part.ffn.expert for part in state.parts)
        taken = [read for read in reads if read.startswith(f"{name}[")]
        assert taken == [f"{name}{chosen}"]


def test_a_scan_writes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the checkpoint nor where temporary files go."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert run("scan", folder, "--json").code == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert list(scratch.iterdir()) == []


def test_an_ablation_reports_draws_and_saves_rows_of_an_expert(folder: Path, tmp_path: Path) -> None:
    task = ("--task", f"ppl:{folder / 'text.txt'}", "--window", 16)
    plot, saved = tmp_path / "figure.png", tmp_path / "saved"
    shown = run("ablate", folder, *task, "-k", "0,1", "--draws", 1, "--plot", plot)
    assert shown.code == 0
    massive = run("scan", folder, "--json").document["massive"]
    place = massive["module"] + ("" if massive["expert"] is None else f", expert {massive['expert']}")
    assert f"rows of {place} (layer {LAYER}), ranked: {ROW}" in " ".join(shown.out.split())
    assert plot.stat().st_size > 0
    assert run("ablate", folder, *task, "-k", 1, "--mode", "zero", "--no-controls", "--save", saved).code == 0
    assert run("scan", saved, "--json").document["massive"] is None


def test_macdrop_drops_from_the_expert_that_a_scan_found_and_puts_it_back(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(requires_grad=False)
    massive = scan_model(model).massive
    assert massive is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = decoder_layers(adapter_for(model.config.model_type), model.config)[massive.layer]
    ffn = next(one for one in layer.ffns if one.expert == massive.expert)
    with MacDrop(model, massive, "constant:1", steps=2).step(1):
        for place in ffn.inputs:
            rows = place.read(model)
            assert not rows[list(massive.indices)].any()
            assert rows.any()
        changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
        assert set(changed) == {place.param for place in ffn.inputs}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
