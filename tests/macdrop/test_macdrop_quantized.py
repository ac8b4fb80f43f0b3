"""Where rows are packed, recomputing their outputs equals writing the rows of the unpacked weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from training import ROWS, gradients, loss_of, massive, with_adapter
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mwtool.errors import BadValue, UnsupportedModel
from mwtool.macdrop.callback import MacDropCallback
from mwtool.macdrop.engine import MacDrop

pytest.importorskip("bitsandbytes", reason="an optional library")
pytestmark = [
    # bitsandbytes casts what it is given to float16, and says so each time
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]


def quantized(folder: Path, model_type: str, bits: int, **changes: Any) -> PreTrainedModel:
    plain = tiny.model(model_type, num_hidden_layers=3, hidden_size=64, head_dim=16)  # a block is 64 wide
    options = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32, **changes
    )
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tiny.saved(folder, plain), quantization_config=options
    )
    return loaded


def unpacked(folder: Path, packed: PreTrainedModel) -> PreTrainedModel:
    """The same model with every packed weight as the ordinary one it stands for."""
    from peft.utils.integrations import dequantize_module_weight

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in packed.named_modules():
        if hasattr(module, "quant_state") or type(module).__name__ == "Linear8bitLt":
            weight: Any = model.get_submodule(name).get_parameter("weight")
            weight.data.copy_(dequantize_module_weight(module))
    return model


@pytest.mark.parametrize(
    ("model_type", "storage"), [("llama", "uint8"), ("phi", "uint8"), ("phi3", "uint8"), ("llama", "float32")]
)
def test_4bit_outputs_and_gradients_equal_those_of_written_rows(tmp_path: Path, model_type: str, storage: str) -> None:
    """In float32, to the rounding of sums in another order. Stored as floats, which FSDP needs, they are packed too."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    packed = quantized(tmp_path, model_type, 4, bnb_4bit_quant_storage=storage)
    assert tiny.layers_of(packed)[1].ffns[0].up.read(packed).dtype == getattr(torch, storage)
    for base in (packed, unpacked(tmp_path, packed)):
        macdrop = MacDrop(with_adapter(base), massive(base), "constant:0.6", steps=5)
        with macdrop.step(2):
            model = base
            found.append((loss_of(model).detach(), gradients(model)))
        assert macdrop.how == ("outputs" if base is packed else "weights")
    (loss, grads), (expected, expected_grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected_grads.keys() != set()
    for name, gradient in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_grads[name], rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


def rows_output(base: PreTrainedModel, macdrop: MacDrop | None) -> Tensor:
    seen: list[Tensor] = []
    layer: nn.Module = base.model.layers[1].mlp.up_proj.base_layer
    if macdrop is not None:
        macdrop.begin(1)
    handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output.detach()))
    loss_of(base)
    handle.remove()
    if macdrop is not None:
        macdrop.restore()
    return seen[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_masked_rows_change_and_all_is_as_before_after_the_step(tmp_path: Path, bits: int) -> None:
    base = quantized(tmp_path, "llama", bits)
    macdrop = MacDrop(with_adapter(base), massive(base), "constant:1", steps=5)
    plain, inside, after = rows_output(base, None), rows_output(base, macdrop), rows_output(base, None)
    others = [row for row in range(64) if row not in ROWS]
    assert not inside[..., list(ROWS)].any()
    assert torch.equal(inside[..., others], plain[..., others])
    assert torch.equal(after, plain)
    assert plain[..., list(ROWS)].any()


def test_8bit_rows_are_those_of_the_unpacked_weight(tmp_path: Path) -> None:
    """bitsandbytes rounds inputs to 8 bits too; the recomputed rows do not: equal to 3 % of the largest output."""
    base = quantized(tmp_path, "llama", 8)
    macdrop = MacDrop(with_adapter(base), massive(base), "constant:1e-9", steps=5)  # nothing is dropped
    plain, inside = rows_output(base, None), rows_output(base, macdrop)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0.03 * plain.abs().max().item())
    assert not torch.equal(inside, plain)


def test_the_copy_of_the_rows_is_small_and_checkpointing_is_exact(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    model = with_adapter(base)
    macdrop = MacDrop(model, massive(base), "constant:0.5", steps=5)
    assert macdrop.kept_bytes == 2 * 5 * 64 * macdrop.matrices[0].kept.element_size()
    with macdrop.step(1):
        plain = gradients(model)
        torch.utils.checkpoint.set_checkpoint_early_stop(True)
        for layer in base.model.layers:
            layer.forward = checkpointed(layer.forward)
        again = gradients(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def checkpointed(forward: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_dora_on_packed_rows_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    model = with_adapter(base, dora=True)
    with pytest.raises(UnsupportedModel, match="quantized under DoRA, whose norm reads the packed rows"):
        MacDrop(model, massive(base), "step:0.8", steps=5)


def test_dora_elsewhere_does_not_matter(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    model = with_adapter(base, dora=True, target_modules=["q_proj", "down_proj"])
    with MacDrop(model, massive(base), "step:0.8", steps=5).step(1):
        assert loss_of(model).isfinite()


def test_an_evaluation_before_does_not_change_what_is_kept(tmp_path: Path) -> None:
    """On CPUs that have a kernel for it, bitsandbytes then stores 4 bit in another order, its scales in bfloat16."""
    base = quantized(tmp_path, "llama", 4)
    expected = MacDrop(base, massive(base), "constant:1", steps=3).matrices[0].kept
    with torch.no_grad():
        loss_of(base.eval())
    kept = MacDrop(base, massive(base), "constant:1", steps=3).matrices[0].kept
    torch.testing.assert_close(kept, expected, rtol=1 / 128, atol=0)


def test_compiled_quantized_models_are_refused_because_hooks_would_be_ignored(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    rows = massive(base)
    with pytest.raises(UnsupportedModel, match="ignores hooks registered later"):
        MacDrop(torch.compile(with_adapter(base), backend="eager"), rows, "step:0.8", steps=5)
    callback, arguments = MacDropCallback(rows), TrainingArguments(str(tmp_path), torch_compile=True)
    with pytest.raises(UnsupportedModel, match="ignores hooks registered later"):
        callback.on_train_begin(arguments, TrainerState(max_steps=5), TrainerControl(), model=base)


def test_merging_into_packed_rows_inside_a_step_is_refused(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    model = with_adapter(base, target_modules=["up_proj"], layers_to_transform=[1])
    plain = rows_output(base, None)
    with (
        pytest.raises(BadValue, match="dropped during this training step"),
        MacDrop(model, massive(base), "constant:1", steps=5).step(1),
    ):
        model.merge_adapter()
    assert torch.equal(rows_output(base, None), plain)


def test_a_failed_step_is_restored_by_the_next_engine(tmp_path: Path) -> None:
    base = quantized(tmp_path, "llama", 4)
    model, rows = with_adapter(base), massive(base)
    plain = rows_output(base, None)
    MacDrop(model, rows, "constant:1", steps=5).begin(1)
    MacDrop(model, rows, "constant:1", steps=5)
    assert torch.equal(rows_output(base, None), plain)


def test_a_layer_that_is_never_called_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that read packed weights by themselves would train without MacDrop, and nobody would know."""
    base = quantized(tmp_path, "llama", 4)
    macdrop = MacDrop(with_adapter(base), massive(base), "constant:1", steps=5)
    with caplog.at_level("WARNING", "mwtool"):
        with macdrop.step(1):
            loss_of(base)
        assert not caplog.text
        macdrop = MacDrop(base, massive(base), "constant:1", steps=5)
        with macdrop.step(1):
            pass
    assert "up_proj.weight was not called during a step" in caplog.text
