"""Qwen MoE: dense and MoE layers mixed; all but Qwen3-MoE have a gated shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp
from mwtool_adapters.llama import LINEAR, VISION

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}


class QwenMoe:
    tiny: ClassVar = {
        "qwen2_moe": {**MOE, "mlp_only_layers": [2]},
        "qwen3_moe": {**MOE, "decoder_sparse_step": 2},
        "qwen3_next": {**MOE, **LINEAR},
        "qwen3_5_moe": {"text_config": {**MOE, **LINEAR}, "vision_config": VISION},
        "qwen3_5_moe_text": {**MOE, **LINEAR},
    }

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        config = config.get_text_config()  # Qwen3.5 with image input is loaded as its text model
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        if _dense(config, index):
            return DecoderLayer(path, (gated_mlp(mlp, act),), adds=mlp)
        experts = Experts(f"{mlp}.experts", router=f"{mlp}.gate")
        routed = fused_experts(experts.module, config.num_experts, config.moe_intermediate_size, act)
        shared = (gated_mlp(f"{mlp}.shared_expert", act),) if self.shared else ()
        return DecoderLayer(path, (*routed, *shared), adds=mlp, experts=experts)


def _dense(config: PretrainedConfig, index: int) -> bool:
    """Qwen3.5 has no such options: all of its layers are MoE."""
    if not hasattr(config, "mlp_only_layers"):
        return False
    return bool(index in config.mlp_only_layers or (index + 1) % config.decoder_sparse_step or not config.num_experts)


QWEN2_MOE = QwenMoe(shared=True)
QWEN3_MOE = QwenMoe(shared=False)
