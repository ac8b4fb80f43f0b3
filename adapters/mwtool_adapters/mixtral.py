"""Mixtral and Phi-3.5-MoE: every layer has routed experts and nothing else. OLMoE: the same under other names."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Mixtral:
    """router: the router's name in the block."""

    tiny: ClassVar = {
        "mixtral": {"num_local_experts": 4},
        "phimoe": {"num_local_experts": 4},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    }

    def __init__(self, router: str = "gate") -> None:
        self.router = router

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        experts = Experts(f"{path}.mlp.experts", router=f"{path}.mlp.{self.router}")
        ffns = fused_experts(experts.module, config.num_local_experts, config.intermediate_size, config.hidden_act)
        return DecoderLayer(path, ffns, adds=f"{path}.mlp", experts=experts)


MIXTRAL = Mixtral()
PHIMOE = Mixtral(router="router")
