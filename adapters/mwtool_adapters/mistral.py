"""Mistral and Ministral."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Mistral:
    tiny: ClassVar = {
        "ministral": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "ministral3": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            }
        },
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        return DecoderLayer(path, (gated_mlp(f"{path}.mlp", config.hidden_act),), adds=f"{path}.mlp")


ADAPTER = Mistral()
