"""Phi (1, 1.5, 2), without a gate and with biases; Phi-3 and Phi-4, with gate and up fused in one parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import FFN, DecoderLayer, WeightSlice

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Phi:
    """Attention and MLP run side by side on the same normalised input; each is added by itself."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        mlp = f"{path}.mlp"
        ffn = FFN(
            up=WeightSlice(f"{mlp}.fc1.weight"),
            down=WeightSlice(f"{mlp}.fc2.weight"),
            act=config.hidden_act,
            up_bias=WeightSlice(f"{mlp}.fc1.bias"),
            down_bias=WeightSlice(f"{mlp}.fc2.bias"),
            hook=f"{mlp}.fc2",
        )
        return DecoderLayer(path, (ffn,), adds=mlp)


class Phi3:
    """`gate_up_proj` is (2I, H): rows 0..I-1 the gate, rows I..2I-1 up."""

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        mlp, width = f"{path}.mlp", config.intermediate_size
        ffn = FFN(
            up=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width, None),)),
            gate=WeightSlice(f"{mlp}.gate_up_proj.weight", (slice(width),)),
            down=WeightSlice(f"{mlp}.down_proj.weight"),
            act=config.hidden_act,
            hook=f"{mlp}.down_proj",
        )
        return DecoderLayer(path, (ffn,), adds=mlp)


PHI = Phi()
PHI3 = Phi3()
