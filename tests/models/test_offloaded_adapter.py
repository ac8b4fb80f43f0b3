"""A LoRA or DoRA adapter over offloaded layers computes what it computes over layers in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from sweeps import swept
from torch import Tensor
from words import planted_folder

from mwtool.ablation.sweep import Sweep
from mwtool.errors import UnsupportedModel
from mwtool.models.load import load
from mwtool.models.peft_adapter import with_adapter
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.settings import Choice
from mwtool.surgery.attack import Attack, edited

IDS = torch.arange(3, 40)[None]


def adapter(folder: Path, base: Path, *, dora: bool = False, **changes: Any) -> Path:
    """An adapter of random weights on every linear layer; row 4 of `up` in layer 1 gets nothing from it."""
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "use_dora": dora, "init_lora_weights": False, **changes},
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(tiny.opened(base), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if re.search(r"layers\.1\..*up_proj.lora_B|h\.1\.mlp\.c_fc\.lora_B", name):
                parameter[4] = 0  # zeroed, this row has norm 0 under DoRA
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("on", ["base", "merged"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("model_type", "place"), [("llama", "cpu"), ("llama", "disk"), ("gpt2", "cpu"), ("phi3", "disk")]
)
def test_over_offloaded_layers_it_gives_bit_for_bit_what_it_gives_in_memory(
    tmp_path: Path, model_type: str, place: str, kind: str, on: Any
) -> None:
    from accelerate import cpu_offload, disk_offload

    base = tiny.saved(tmp_path / "base", tiny.model(model_type, torch.bfloat16, num_hidden_layers=2))
    folder = adapter(tmp_path / "adapter", base, dora=kind == "dora", fan_in_fan_out=model_type == "gpt2")
    here, away = tiny.opened(base).eval(), tiny.opened(base).eval()
    if place == "disk":
        disk_offload(away, tmp_path / "off", execution_device=torch.device("cpu"))
    else:
        cpu_offload(away, execution_device=torch.device("cpu"))
    alone, bare = logits(away), logits(here)
    (near, rows_near), (far, rows_far) = (with_adapter(one, str(folder), on) for one in (here, away))
    plain = logits(far)
    assert torch.equal(plain, logits(near))
    assert not torch.equal(plain, bare)
    ffn = tiny.layers_of(tiny.opened(base))[1].ffns[0]
    for attack in (Attack("zero", 2), Attack("retain", 2), Attack("scale", 2, 0.5)):
        with edited(rows_near, ffn, [1, 4], attack), edited(rows_far, ffn, [1, 4], attack):
            attacked = logits(far)
            assert attacked.isfinite().all()
            assert torch.equal(attacked, logits(near))
            assert not torch.equal(attacked, plain)
        assert torch.equal(logits(far), plain)
    assert any(parameter.is_meta for parameter in far.parameters())
    if on == "base":  # nothing was written to what the base weights are loaded from
        with far.disable_adapter():
            assert torch.equal(logits(far), alone)


@pytest.mark.parametrize("on", ["base", "merged"])
def test_a_sweep_over_an_adapter_of_a_model_left_on_the_disk_has_the_figures_of_one_in_memory(
    tmp_path: Path, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = planted_folder(tmp_path / "base", num_hidden_layers=4)
    folder, stored = adapter(tmp_path / "adapter", base, dora=True), (base / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)  # where PEFT would write
    here = load(str(folder), on=on)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": "disk" if index in (1, 2) else "cpu" for index in range(4)}
    away = load(str(folder), on=on, model_options={"device_map": places, "offload_folder": str(tmp_path / "off")})
    sweep = Sweep((Attack("zero"), Attack("retain")), (1,), draws=1)
    near, far = (swept(one, sweep, Choice(layers=(1,), indices=(17,))) for one in (here, away))
    values = {(run.attack, run.control): run.measured[0].value for run in near.runs}
    assert near.baseline[0].value == far.baseline[0].value
    for one, other in zip(scan_loaded(away).states, scan_loaded(here).states, strict=True):
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-5, atol=1e-5)
    assert len(far.runs) == 4
    assert all(values[run.attack, run.control] == run.measured[0].value for run in far.runs)
    assert (base / "model.safetensors").read_bytes() == stored
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "off"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["up_proj"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
    ],
)
def test_one_that_holds_or_changes_weights_of_the_base_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    from accelerate import cpu_offload

    base = tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=2))
    folder = adapter(tmp_path / "adapter", base, **changes)
    away = cpu_offload(tiny.opened(base), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=rf"{said}.* cannot be put on a base model that is offloaded in part"):
        with_adapter(away, str(folder), "base")


def test_of_other_kinds_none_is_put_on_offloaded_layers(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    base = tiny.saved(tmp_path / "base", tiny.model("llama", num_hidden_layers=2))
    config = IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.opened(base), config).save_pretrained(tmp_path / "adapter")  # type: ignore[operator] # generic
    away = cpu_offload(tiny.opened(base), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"\(IA3\) cannot be put on a base model that is offloaded in part"):
        with_adapter(away, str(tmp_path / "adapter"), "base")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"
