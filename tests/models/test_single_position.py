"""Scans of bos alone leave out what a single position does without, and what that is has been tried, not assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from mwtool.errors import BadCheckpoint
from mwtool.models.single_position import unneeded
from mwtool.models.streaming import Stream
from mwtool.scan.scanner import Scan, scan_checkpoint
from mwtool.scan.settings import Settings, Texts

Q, K = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
LEFT_OUT = {
    "llama": {Q, K},
    "gemma3_text": {Q, K},  # windows, norms of queries and keys
    "deepseek_v3": {"self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight"},  # keys and values share a matrix
    "opt": {Q, K},
    "gptj": {"attn.q_proj.weight", "attn.k_proj.weight"},
    "gpt_oss": set(),  # sinks
    "mimo_v2_flash": {Q, K},  # sinks in some layers
    "qwen3_next": {K},  # queries and gates share a matrix; linear attention
    "phi3": set(),  # queries, keys and values share a matrix
    "jamba": {Q, K, "mamba.A_log"},  # how fast a state space model forgets
}


def scans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scan, Scan]:
    """Of a checkpoint: as it is done, and with everything read."""
    found = scan_checkpoint(str(folder))
    with monkeypatch.context() as patched:
        patched.setattr(Stream, "leave_out", lambda _stream: None)
        return found, scan_checkpoint(str(folder))


def document(scan: Scan) -> dict[str, Any]:
    return {**scan.to_dict(), "unread": None}


@pytest.mark.parametrize("model_type", LEFT_OUT)
def test_every_state_is_that_of_the_whole_model_bit_for_bit(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.saved(tmp_path, tiny.model(model_type, torch.bfloat16))
    found, whole = scans(folder, monkeypatch)
    assert document(found) == document(whole)
    for one, other in zip(found.states, whole.states, strict=True):
        for name in ("hidden", "intermediate", "added"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert {one.parameter for one in found.unread} == LEFT_OUT[model_type]
    assert whole.unread == ()


def test_layers_are_told_apart_by_what_they_compute() -> None:
    """Of mimo_v2_flash, layers with a window have sinks."""
    model = tiny.model("mimo_v2_flash")
    kinds = model.config.layer_types
    found = unneeded(model, tiny.layers_of(model), torch.device("cpu"))
    assert "sliding_attention" in kinds
    assert {int(path.split(".")[-1]) for path in found} == {
        index for index, kind in enumerate(kinds) if kind == "full_attention"
    }


def left_out(model: PreTrainedModel) -> set[str]:
    return {name for names in unneeded(model, tiny.layers_of(model), torch.device("cpu")).values() for name in names}


def test_attention_that_uses_its_queries_has_them_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *rest = real(self, hidden_states, *args, **kwargs)
        return (output + self.q_proj(hidden_states) * 2.0**-6, *rest)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert {name.rpartition("layers.")[2] for name in left_out(tiny.model("llama", num_hidden_layers=2))} == {
        f"0.{K}",
        f"1.{K}",
    }


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros_like,  # whatever its weights are: nothing can be told
        lambda x: x * float("nan"),
        lambda x: x[:, :, :3] @ torch.ones(4, 4),  # fails
    ],
)
def test_attention_of_which_nothing_can_be_told_is_read_whole(monkeypatch: pytest.MonkeyPatch, output: Any) -> None:
    model = tiny.model("llama", num_hidden_layers=2)
    monkeypatch.setattr(LlamaAttention, "forward", lambda _self, hidden_states, **_: (output(hidden_states), None))
    assert left_out(model) == set()


def test_a_layer_whose_own_weights_are_zero_is_not_taken_for_one_that_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    nn.init.zeros_(model.get_parameter("model.layers.0.self_attn.o_proj.weight"))
    nn.init.zeros_(model.get_parameter("model.layers.0.input_layernorm.weight"))
    found, whole = scans(tiny.saved(tmp_path, model), monkeypatch)
    assert {one.parameter for one in found.unread} == {Q, K}
    assert document(found) == document(whole)


def test_a_weight_that_is_not_read_is_not_said_to_be_finite(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path, tiny.model("llama", tie_word_embeddings=False))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.2.{Q}"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    found = scan_checkpoint(str(folder))
    assert found.unread[0].parameter == Q
    assert found.unread[0].layers == tuple(range(tiny.LAYERS))
    assert found.to_dict()["unread"][0] == {"parameter": Q, "layers": list(range(tiny.LAYERS))}
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(BadCheckpoint, match=r"q_proj\.weight holds NaN"):  # a text has several positions
        scan_checkpoint(str(folder), Settings(texts=Texts(sinks=str(tmp_path / "text.txt"))))


def test_a_model_is_left_as_it_was() -> None:
    model = tiny.model("gemma3_text")
    before, state = tiny.digest(model), torch.get_rng_state()
    hooks = sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in model.modules())
    meta = model.to("meta")
    unneeded(meta, tiny.layers_of(meta), torch.device("cpu"))
    assert all(one.is_meta for one in meta.parameters())
    assert all("forward" not in vars(one) for one in meta.modules())
    assert sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in meta.modules()) == hooks
    assert torch.equal(state, torch.get_rng_state())
    assert tiny.digest(tiny.model("gemma3_text")) == before


def test_trials_and_layers_do_without_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tiny.saved(tmp_path, tiny.model("llama", torch.bfloat16)), list[torch.Tensor]()
    whole = LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.q_proj.weight.detach())  # held, so that its memory is not given to another
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    layers = len(scan_checkpoint(str(folder)).states)
    trials, read = seen[:-layers], seen[-layers:]
    assert len(trials) > 1
    assert len({one.data_ptr() for one in trials}) == 1
    assert len({one.data_ptr() for one in read}) == 1
    assert not any(one.any() for one in read)
