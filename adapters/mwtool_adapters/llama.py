"""Llama and the families that share its decoder layer: Qwen2, Qwen3, OLMo, OLMo 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Llama:
    """`adds` is what the residual stream receives: the MLP's output, or that of the norm behind it."""

    def __init__(self, adds: str = "mlp") -> None:
        self.adds = adds

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = gated_mlp(f"{path}.mlp", config.hidden_act, bias=getattr(config, "mlp_bias", False))
        return DecoderLayer(path, (ffn,), adds=f"{path}.{self.adds}")


LLAMA = Llama()
OLMO2 = Llama(adds="post_feedforward_layernorm")
