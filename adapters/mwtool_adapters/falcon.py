"""Falcon: no gate; attention in parallel, added in place to the MLP's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Falcon:
    tiny: ClassVar = {"falcon": {"head_dim": None}}  # it computes head_dim itself and does not accept the option

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"transformer.h.{index}"
        ffn = plain_mlp(f"{path}.mlp", "dense_h_to_4h", "dense_4h_to_h", config.activation, bias=config.bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


ADAPTER = Falcon()
