"""GPT-NeoX (Pythia): no gate, biases, attention and MLP in parallel unless the configuration says otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GptNeoX:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"gpt_neox.layers.{index}"
        ffn = plain_mlp(f"{path}.mlp", "dense_h_to_4h", "dense_4h_to_h", config.hidden_act)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


ADAPTER = GptNeoX()
