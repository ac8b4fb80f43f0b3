"""Nemotron, Arcee and nanochat: no gate; the activation is the square of a ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Nemotron:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = plain_mlp(f"{path}.mlp", "up_proj", "down_proj", config.hidden_act, bias=config.mlp_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


class NanoChat:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = plain_mlp(f"{path}.mlp", "fc1", "fc2", config.hidden_act, bias=False)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


NEMOTRON = Nemotron()
NANOCHAT = NanoChat()
