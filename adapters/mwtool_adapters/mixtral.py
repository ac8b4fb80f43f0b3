"""Mixtral and other types in which every layer is MoE: Phi-3.5-MoE, OLMoE, MiniMax-M2, Hunyuan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Mixtral:
    """router, shared: module names in the MoE block. scores, proportional: as in `Experts`."""

    tiny: ClassVar[dict[str, dict[str, Any]]] = {
        "hunyuan_v1_moe": {
            "num_experts": 4,
            "moe_topk": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "mixtral": {"num_local_experts": 4},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "phimoe": {"num_local_experts": 4},
    }

    def __init__(
        self,
        router: str = "gate",
        *,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        proportional: bool = True,
        shared: str | None = None,
    ) -> None:
        self.router, self.scores, self.proportional, self.shared = router, scores, proportional, shared

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        experts = Experts(
            f"{mlp}.experts", router=f"{mlp}.{self.router}", scores=self.scores, proportional=self.proportional
        )
        routed = fused_experts(experts.module, config.num_local_experts, config.intermediate_size, act)
        shared = () if self.shared is None else (gated_mlp(f"{mlp}.{self.shared}", act),)
        return DecoderLayer(path, (*routed, *shared), adds=mlp, experts=experts)


HUNYUAN = Mixtral(shared="shared_mlp")
MINIMAX_M2 = Mixtral(scores="sigmoid")
MIXTRAL = Mixtral()
PHIMOE = Mixtral(router="router", proportional=False)  # each weight is normalized without the experts chosen before
