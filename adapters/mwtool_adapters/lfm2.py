"""LFM2: convolution and attention layers, with its own names for the gated FFN; its MoE layers use the usual names."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import FFN, DecoderLayer, Experts, WeightSlice, fused_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KINDS = ["conv", "full_attention", "conv"]


class Lfm2:
    """`layer_types` lists every layer: three, the default of a tiny model."""

    tiny: ClassVar = {
        "lfm2": {"block_auto_adjust_ff_dim": False},
        "lfm2_moe": {
            "layer_types": KINDS,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_dense_layers": 1,
        },
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        block = f"{path}.feed_forward"
        if index < getattr(config, "num_dense_layers", config.num_hidden_layers):
            return DecoderLayer(path, (_dense(block),), adds=block)
        experts = Experts(f"{block}.experts", router=f"{block}.gate", scores="sigmoid")
        routed = fused_experts(experts.module, config.num_experts, config.moe_intermediate_size, "silu")
        return DecoderLayer(path, routed, adds=block, experts=experts)


def _dense(block: str) -> FFN:
    return FFN(
        up=WeightSlice(f"{block}.w3.weight"),
        gate=WeightSlice(f"{block}.w1.weight"),
        down=WeightSlice(f"{block}.w2.weight"),
        hook=f"{block}.w2",
    )


ADAPTER = Lfm2()
