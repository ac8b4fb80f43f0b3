"""ERNIE 4.5 MoE: MoE layers at an interval between two bounds, with a shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ErnieMoe:
    tiny: ClassVar = {
        "ernie4_5_moe": {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,  # by default every layer is MoE
        }
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        within = config.moe_layer_start_index <= index <= config.moe_layer_end_index
        if not within or (index + 1) % config.moe_layer_interval:
            return DecoderLayer(path, (gated_mlp(mlp, act, bias=config.use_bias),), adds=mlp)
        experts = Experts(f"{mlp}.experts", router=f"{mlp}.gate")
        routed = fused_experts(experts.module, config.moe_num_experts, config.moe_intermediate_size, act)
        if not config.moe_num_shared_experts:
            return DecoderLayer(path, routed, adds=mlp, experts=experts)
        shared = gated_mlp(f"{mlp}.shared_experts", act, bias=config.use_bias)
        return DecoderLayer(path, (*routed, shared), adds=mlp, experts=experts)


ADAPTER = ErnieMoe()
