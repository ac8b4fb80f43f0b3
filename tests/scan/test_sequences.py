"""Forwards over whole sequences hand on what transformers itself returns, layer by layer, in memory and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from words import with_tokenizer

from mwtool.errors import BadCheckpoint
from mwtool.models.locate import locate
from mwtool.scan.sequences import Taps, run
from mwtool.scan.settings import Settings
from mwtool.scan.subject import Subject, in_memory, streamed

TYPES = ["deepseek_v3", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "jamba", "llama", "lfm2_moe", "mixtral", "opt", "phi3"]
"""Attention of several kinds: latent, soft-capped, with its own sinks, beside Mamba and convolutions, fused."""
IDS = torch.tensor([[1, 7, 30, 8, 8, 41], [1, 9, 3, 22, 60, 5]])


def captured(subject: Subject, ids: Tensor = IDS, at: int = 2) -> dict[str, dict[int, Tensor]]:
    found: dict[str, dict[int, Tensor]] = {"hidden": {}, "attention": {}, "intermediate": {}}
    run(
        subject,
        ids,
        Taps(
            hidden=lambda layer, one: found["hidden"].update({layer: one.clone()}),
            attention=lambda layer, one: found["attention"].update({layer: one.clone()}),
            intermediate=lambda layer, one: found["intermediate"].update({layer: one.clone()}),
            at=at,
        ),
    )
    return found


def subject_of(model: Any) -> Subject:
    return in_memory(model.eval(), None, Settings(bos=str(tiny.BOS)))


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_captured_is_what_transformers_returns(model_type: str) -> None:
    model = tiny.model(model_type, num_hidden_layers=4)
    found = captured(subject_of(model))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=IDS, use_cache=False, output_attentions=True, output_hidden_states=True)
    expected = [one for one in output.attentions if one is not None]
    assert len(found["attention"]) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(found["attention"].values(), expected, strict=True))
    for layer in range(3):  # transformers returns the last one behind the final norm
        assert torch.equal(found["hidden"][layer], output.hidden_states[layer + 1])


def test_the_intermediate_state_is_the_input_of_the_down_projection() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    seen: list[Tensor] = []
    handle = model.get_submodule("model.layers.2.mlp.down_proj").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    z = captured(subject_of(model))["intermediate"]
    handle.remove()
    assert list(z) == [2]
    assert torch.equal(z[2], seen[0])


def test_of_a_mixture_it_is_that_of_the_expert_with_the_largest_weight_at_each_position() -> None:
    model = tiny.model("mixtral", num_hidden_layers=4)
    seen: list[Any] = []
    experts: Any = model.get_submodule("model.layers.2.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.extend(args))
    z = captured(subject_of(model))["intermediate"][2].reshape(IDS.numel(), -1)
    handle.remove()
    x, chosen, weights = seen
    for at in range(IDS.numel()):
        expert = int(chosen[at, weights[at].argmax()])
        gate, up = (experts.gate_up_proj[expert] @ x[at]).chunk(2)
        torch.testing.assert_close(z[at], torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_streamed_from_disk_it_is_the_same_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    model = tiny.model(model_type, num_hidden_layers=4)
    folder = with_tokenizer(tmp_path, model)
    whole, parts = captured(subject_of(model)), captured(streamed(locate(str(folder)), Settings()))
    for name, layers in whole.items():
        assert list(layers) == list(parts[name])
        for layer, tensor in layers.items():
            assert torch.equal(tensor, parts[name][layer]), (name, layer)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    model.set_attn_implementation("sdpa")
    before = tiny.digest(model)
    captured(subject_of(model), at=1)
    assert model.config._attn_implementation == "sdpa"
    assert tiny.digest(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_weights_of_a_layer_are_freed_before_the_next_layer_s_are_handed_on() -> None:
    before: list[StorageWeakRef] = []

    def look(_layer: int, weights: Tensor) -> None:
        assert all(one.expired() for one in before)
        before.append(StorageWeakRef(weights.untyped_storage()))

    run(subject_of(tiny.model("llama", num_hidden_layers=4)), IDS, Taps(attention=look))
    assert len(before) == 4


def test_a_forward_ends_behind_the_last_layer_asked_for() -> None:
    seen: list[int] = []
    run(subject_of(tiny.model("llama")), IDS, Taps(hidden=lambda layer, _: seen.append(layer), last=2))
    assert seen == [0, 1, 2]


def test_a_stream_that_is_not_finite_is_refused() -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] = torch.inf
    with pytest.raises(BadCheckpoint, match="after layer 1 is not finite"):
        run(subject_of(model), IDS, Taps())
