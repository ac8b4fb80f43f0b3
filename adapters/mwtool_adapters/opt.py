"""OPT: two matrices in the decoder layer itself, without a module around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, UnsupportedModel, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Opt:
    tiny: ClassVar = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 16}}

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        if not config.do_layer_norm_before:
            raise UnsupportedModel(
                "opt with do_layer_norm_before=false (opt-350m) normalises the residual stream itself after the FFN, "
                "so no part of the stream is the FFN's; the other sizes of OPT work"
            )
        path = f"model.decoder.layers.{index}"
        ffn = plain_mlp(path, "fc1", "fc2", config.activation_function, bias=config.enable_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.fc2")


ADAPTER = Opt()
