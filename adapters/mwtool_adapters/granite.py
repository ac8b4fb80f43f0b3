"""Granite: Llama's decoder layer, with outputs scaled before they are added to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Granite:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = gated_mlp(f"{path}.mlp", config.hidden_act, bias=config.mlp_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp", scale=config.residual_multiplier)


ADAPTER = Granite()
