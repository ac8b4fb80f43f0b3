"""Llama and the many families that share its decoder layer, or differ only in the norm after the FFN."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
"""Options of tiny Qwen models with linear attention or image input, MoE or dense."""


class Llama:
    """`adds`: the module whose output is added to the residual stream: the MLP, or the norm after it.

    Where attention runs beside the MLP (Cohere, some StableLM), each is added by itself: nothing changes here.
    """

    tiny: ClassVar = {
        "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "qwen3_5": {"text_config": LINEAR, "vision_config": VISION},
        "qwen3_5_text": LINEAR,
    }

    def __init__(self, adds: str = "mlp") -> None:
        self.adds = adds

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        config = config.get_text_config()  # Qwen3.5 with image input is loaded as its text model
        ffn = gated_mlp(f"{path}.mlp", config.hidden_act, bias=_biased(config))
        return DecoderLayer(path, (ffn,), adds=f"{path}.{self.adds}")


def _biased(config: PretrainedConfig) -> bool:
    """ERNIE calls it `use_bias`; families without the option have no biases."""
    named = "use_bias" if config.model_type == "ernie4_5" else "mlp_bias"
    return bool(getattr(config, named, False))


LLAMA = Llama()
POST_NORM = Llama(adds="post_feedforward_layernorm")
