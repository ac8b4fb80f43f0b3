"""Mistral."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Mistral:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        return DecoderLayer(path, (gated_mlp(f"{path}.mlp", config.hidden_act),), adds=f"{path}.mlp")


ADAPTER = Mistral()
