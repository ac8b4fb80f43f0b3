"""Commands on one expert, or on gate and up fused in one parameter, as on a dense FFN."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from command import run
from test_ablate import with_tokenizer
from transformers import AutoModelForCausalLM

from mwtool import MacDrop, scan_model
from mwtool.registry import adapter_for
from mwtool.scan import decoder_layers

ROW, LAYER = 11, 3
KINDS = ["deepseek_v3", "gpt_oss", "mixtral", "phi3", "qwen2_moe"]
"""A shared expert beside; transposed, interleaved and biased; fused; fused and dense; dense among mixtures."""


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny.model(request.param)
    tiny.plant(model, layer=LAYER, row=ROW)
    return with_tokenizer(tmp_path / request.param, model)


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
