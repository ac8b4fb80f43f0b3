"""Gemma, Gemma 2, and Gemma 3, text-only and multimodal.

From Gemma 2 on, a norm follows the FFN: it rescales the output of `down_proj` before it is
added to the residual stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Gemma:
    tiny: ClassVar = {
        "gemma2": {"query_pre_attn_scalar": 8},
        "gemma3_text": {"query_pre_attn_scalar": 8},
        "gemma3": {
            "text_config": {"query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    }

    def __init__(self, layers: str, act: str, adds: str) -> None:
        self.layers, self.act, self.adds = layers, act, adds

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"{self.layers}.{index}"
        act = getattr(config.get_text_config(), self.act)
        return DecoderLayer(path, (gated_mlp(f"{path}.mlp", act),), adds=f"{path}.{self.adds}")


GEMMA = Gemma("model.layers", act="hidden_act", adds="mlp")
VAULTGEMMA = Gemma("model.layers", act="hidden_activation", adds="mlp")
GEMMA2 = Gemma("model.layers", act="hidden_activation", adds="post_feedforward_layernorm")
GEMMA3 = Gemma("model.language_model.layers", act="hidden_activation", adds="post_feedforward_layernorm")
