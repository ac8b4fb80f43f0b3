"""Qwen's mixtures of experts: dense and MoE layers mixed; Qwen2-MoE and Qwen3-Next with a gated shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class QwenMoe:
    def __init__(self, *, shared: bool) -> None:
        self.shared = shared

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        dense = index in config.mlp_only_layers or (index + 1) % config.decoder_sparse_step or not config.num_experts
        if dense:
            return DecoderLayer(path, (gated_mlp(mlp, act),), adds=mlp)
        experts = Experts(f"{mlp}.experts", router=f"{mlp}.gate")
        routed = fused_experts(experts.module, config.num_experts, config.moe_intermediate_size, act)
        shared = (gated_mlp(f"{mlp}.shared_expert", act),) if self.shared else ()
        return DecoderLayer(path, (*routed, *shared), adds=mlp, experts=experts)


QWEN2_MOE = QwenMoe(shared=True)
QWEN3_MOE = QwenMoe(shared=False)
