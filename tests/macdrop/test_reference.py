"""The reference of preference training: a model with its adapter off sees the pre-trained rows, also inside a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from words import planted

import mwtool
from mwtool import MacDrop, MassiveWeights
from mwtool.errors import BadValue

X = torch.tensor([[1, 5, 9, 3]])


def made(targets: list[str]) -> tuple[Any, Any, MassiveWeights]:
    """A model with an adapter that does something, its pre-trained self, and the massive rows."""
    model = tiny.model("llama", num_hidden_layers=4)
    tiny.plant(model)
    clean, massive = copy.deepcopy(model), mwtool.scan_model(model).massive
    assert massive is not None
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return wrapped, clean, massive


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@contextmanager
def another_adapter(model: Any) -> Iterator[None]:
    """As TRL refers to a frozen copy of an adapter that is trained further."""
    model.set_adapter("ref")
    yield
    model.set_adapter("default")


@pytest.mark.parametrize("targets", [["up_proj", "gate_proj"], ["q_proj"]], ids=["around the rows", "elsewhere"])
def test_the_model_with_its_adapter_off_is_the_pre_trained_one_bit_for_bit(targets: list[str]) -> None:
    model, clean, massive = made(targets)
    expected = clean(X).logits
    with MacDrop(model, massive, "constant:0.9", steps=4).step(1):
        dropped = model(X).logits
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(X).logits, expected)
        assert torch.equal(model(X).logits, dropped)  # and the policy is masked as before
    assert not torch.equal(dropped, model(X).logits)


def test_a_reference_between_forward_and_backward_leaves_the_gradients_as_they_were() -> None:
    """In the order of DPO: policy, reference, backward of the policy."""
    model, _, massive = made(["up_proj", "down_proj"])
    found = []
    for reference in (False, True):
        model.zero_grad()
        with MacDrop(model, massive, "constant:0.5", steps=4).step(1):
            loss = model(X, labels=X).loss
            if reference:
                with torch.no_grad(), model.disable_adapter():
                    model(X)
            loss.backward()
        found.append(gradients(model))
    assert found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_adapter_that_is_not_trained_sees_the_pre_trained_rows() -> None:
    model, _, massive = made(["up_proj", "gate_proj"])
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["up_proj", "gate_proj"]))
    with another_adapter(model):
        expected = model(X).logits
    with MacDrop(model, massive, "constant:0.9", steps=4).step(1), torch.no_grad(), another_adapter(model):
        assert torch.equal(model(X).logits, expected)


def test_a_failing_reference_leaves_the_rows_dropped_and_then_restored() -> None:
    model, clean, massive = made(["up_proj", "gate_proj"])
    digest = tiny.digest(clean)
    base = model.get_base_model()
    up = base.get_submodule(f"{massive.module}.up_proj.base_layer")
    macdrop = MacDrop(model, massive, "constant:0.9", steps=4)
    with macdrop.step(1):
        masked = up.weight.clone()
        with pytest.raises(RuntimeError), torch.no_grad(), model.disable_adapter():
            up(torch.zeros(1, 3))  # no such width
        assert torch.equal(up.weight, masked)
    assert tiny.digest(model.unload()) == digest


def test_a_reference_that_keeps_a_graph_is_refused() -> None:
    """Its backward pass would find other rows than its forward pass."""
    model, _, massive = made(["up_proj", "gate_proj"])
    model.enable_input_require_grads()
    refused = pytest.raises(BadValue, match=r"run the reference under torch\.no_grad")
    with MacDrop(model, massive, "constant:0.9", steps=4).step(1), refused, model.disable_adapter():
        model(X)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's calls
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # Trainer's, without a GPU
def test_trls_dpo_compares_with_the_pre_trained_model(tmp_path: Path) -> None:
    """What its reference computes inside the training steps is what a clean copy computes of the same inputs."""
    from trl import DPOConfig, DPOTrainer

    loaded = planted(tmp_path / "model", num_hidden_layers=4)
    loaded.tokenizer.pad_token = "</s>"
    clean, massive = copy.deepcopy(loaded.model), mwtool.scan_model(loaded.model).massive
    records = [{"prompt": f"w{n} w2", "chosen": " w3 w4", "rejected": " w5 w6"} for n in range(4)]
    trainer = DPOTrainer(
        model=loaded.model,
        args=DPOConfig(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to="none", bf16=False,
            use_cpu=True, learning_rate=1e-2, logging_steps=1,
        ),
        processing_class=loaded.tokenizer,
        train_dataset=Dataset.from_list(records),
        peft_config=LoraConfig(r=2, target_modules=["up_proj", "gate_proj"]),
        callbacks=[mwtool.MacDropCallback(massive, "constant:0.9")],
    )  # fmt: skip
    seen: list[tuple[bool, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    base = trainer.model.get_base_model()
    up = base.get_submodule(f"{massive.module}.up_proj")

    def record(_model: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
        hidden = output.last_hidden_state.detach().clone()
        seen.append((up.disable_adapters, given["input_ids"], given["attention_mask"], hidden))

    base.model.register_forward_hook(record, with_kwargs=True)
    with mwtool.guard(trainer):
        trainer.train()
    reference = [one for one in seen if one[0]]
    assert len(reference) == 2
    assert len(seen) == 4
    for off, ids, mask, hidden in seen:
        expected = clean.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(hidden, expected) == off
