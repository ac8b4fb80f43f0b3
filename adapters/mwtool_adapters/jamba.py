"""Jamba and Bamba: state-space and attention layers, each followed by an FFN, which in Jamba may be MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Jamba:
    tiny: ClassVar = {
        "jamba": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        }
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        block = f"{path}.feed_forward"
        count = config.layers_num_experts[index]
        if count == 1:
            return DecoderLayer(path, (gated_mlp(block, act),), adds=block)
        experts = Experts(f"{block}.experts", router=f"{block}.router")
        routed = fused_experts(experts.module, count, config.intermediate_size, act)
        return DecoderLayer(path, routed, adds=block, experts=experts)


class Bamba:
    tiny: ClassVar = {
        "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "attn_layer_indices": [1]},
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = gated_mlp(f"{path}.feed_forward", config.hidden_act, bias=config.mlp_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.feed_forward")


BAMBA = Bamba()
JAMBA = Jamba()
