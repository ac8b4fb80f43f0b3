"""GLM and GLM-4: gate and up fused as in Phi-3; GLM-4 has a norm after the FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, fused_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Glm:
    def __init__(self, adds: str) -> None:
        self.adds = adds

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = fused_mlp(f"{path}.mlp", config.intermediate_size, config.hidden_act)
        return DecoderLayer(path, (ffn,), adds=f"{path}.{self.adds}")


GLM = Glm(adds="mlp")
GLM4 = Glm(adds="post_mlp_layernorm")
