"""GPT-NeoX (Pythia), with attention and MLP in parallel by default, and Persimmon: biases and no gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GptNeoX:
    """layers: path of the list of decoder layers."""

    def __init__(self, layers: str) -> None:
        self.layers = layers

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"{self.layers}.{index}"
        ffn = plain_mlp(f"{path}.mlp", "dense_h_to_4h", "dense_4h_to_h", config.hidden_act)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


GPT_NEOX = GptNeoX("gpt_neox.layers")
PERSIMMON = GptNeoX("model.layers")
