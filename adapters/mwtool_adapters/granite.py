"""Granite: Llama's decoder layer, or a mixture, scaled before the residual stream receives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, Experts, fused_experts, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Granite:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = gated_mlp(f"{path}.mlp", config.hidden_act, bias=config.mlp_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp", scale=config.residual_multiplier)


class GraniteMoe:
    tiny: ClassVar = {"granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2}}

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        block = f"{path}.block_sparse_moe"
        experts = Experts(f"{block}.experts", router=f"{block}.router")
        ffns = fused_experts(experts.module, config.num_local_experts, config.intermediate_size, config.hidden_act)
        return DecoderLayer(path, ffns, adds=block, scale=config.residual_multiplier, experts=experts)


GRANITE = Granite()
MOE = GraniteMoe()
