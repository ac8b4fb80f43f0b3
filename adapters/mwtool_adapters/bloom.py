"""BLOOM and MPT: the MLP itself adds the residual, so the FFN's contribution is the output of its last matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.layout import DecoderLayer, UnsupportedModel, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Bloom:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        if config.pretraining_tp > 1 and config.slow_but_exact:
            raise UnsupportedModel(
                "bloom with slow_but_exact cuts its last matrix into pieces and never calls it; "
                "set slow_but_exact to false"
            )
        path = f"transformer.h.{index}"
        ffn = plain_mlp(f"{path}.mlp", "dense_h_to_4h", "dense_4h_to_h", "gelu_pytorch_tanh")
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp.dense_4h_to_h")


class Mpt:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"transformer.blocks.{index}"
        ffn = plain_mlp(f"{path}.ffn", "up_proj", "down_proj", "gelu", bias=False)
        return DecoderLayer(path, (ffn,), adds=f"{path}.ffn.down_proj")


BLOOM = Bloom()
MPT = Mpt()
