"""DeepSeek-V3: the first layers dense, then routed experts scored by a sigmoid beside a shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class DeepseekV3:
    tiny: ClassVar = {
        "deepseek_v3": {
            "head_dim": None,  # follows from the dimensions below
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        }
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        if index < config.first_k_dense_replace:
            return DecoderLayer(path, (gated_mlp(mlp, act),), adds=mlp)
        experts = Experts(f"{mlp}.experts", router=f"{mlp}.gate", scores="sigmoid")
        routed = fused_experts(experts.module, config.num_local_experts, config.moe_intermediate_size, act)
        return DecoderLayer(path, (*routed, gated_mlp(f"{mlp}.shared_experts", act)), adds=mlp, experts=experts)


ADAPTER = DeepseekV3()
