"""DeepSeek-V2, V3 and similar types: dense layers first, then routed experts with a shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
DENSE_FIRST = {**MOE, "first_k_dense_replace": 1}
LATENT = {
    "head_dim": None,  # follows from the dimensions below
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


class Deepseek:
    """scores: turns the router's logits into probabilities. shared: whether there is a shared expert."""

    tiny: ClassVar[dict[str, dict[str, Any]]] = {
        "deepseek_v2": {**DENSE_FIRST, **LATENT},
        "deepseek_v3": {**DENSE_FIRST, **LATENT},
        "dots1": {**DENSE_FIRST, "n_shared_experts": 1},
        "exaone_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
        "glm4_moe": DENSE_FIRST,
        "glm4_moe_lite": {**MOE, **LATENT},
        "mimo_v2_flash": MOE,
        "solar_open": MOE,
    }

    def __init__(self, *, scores: Literal["softmax", "sigmoid"] = "sigmoid", shared: bool = True) -> None:
        self.scores, self.shared = scores, shared

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path, act = f"model.layers.{index}", config.hidden_act
        mlp = f"{path}.mlp"
        if _dense(config, index):
            return DecoderLayer(path, (gated_mlp(mlp, act),), adds=mlp)
        experts = Experts(f"{mlp}.experts", router=f"{mlp}.gate", scores=self.scores)
        count = getattr(config, "num_local_experts", None) or config.num_experts  # V2 has only the second name
        routed = fused_experts(experts.module, count, config.moe_intermediate_size, act)
        shared = (gated_mlp(f"{mlp}.shared_experts", act),) if self.shared else ()
        return DecoderLayer(path, (*routed, *shared), adds=mlp, experts=experts)


def _dense(config: PretrainedConfig, index: int) -> bool:
    """Some types list the kind of every layer, some count the dense layers at the start; Solar has no dense ones."""
    kinds = getattr(config, "mlp_layer_types", None)
    return index < getattr(config, "first_k_dense_replace", 0) if kinds is None else kinds[index] == "dense"


DEEPSEEK_V2 = Deepseek(scores="softmax")
DEEPSEEK_V3 = Deepseek()
MIMO = Deepseek(shared=False)
