"""Phi (1, 1.5, 2), without a gate and with biases; Phi-3 and Phi-4, with gate and up fused in one parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, fused_mlp, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Phi:
    """Attention and MLP run in parallel on the same normalized input; each output is added separately."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        return DecoderLayer(path, (plain_mlp(f"{path}.mlp", "fc1", "fc2", config.hidden_act),), adds=f"{path}.mlp")


class Phi3:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = fused_mlp(f"{path}.mlp", config.intermediate_size, config.hidden_act)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


PHI = Phi()
PHI3 = Phi3()
