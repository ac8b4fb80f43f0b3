"""OPT, XGLM and BioGPT: two matrices in the decoder layer itself, with no MLP module."""

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


class Xglm:
    """layers: path of the list of decoder layers. act: the option that names the activation."""

    tiny: ClassVar = {"xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": None, "attention_heads": 4}}

    def __init__(self, layers: str, act: str) -> None:
        self.layers, self.act = layers, act

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"{self.layers}.{index}"
        return DecoderLayer(path, (plain_mlp(path, "fc1", "fc2", getattr(config, self.act)),), adds=f"{path}.fc2")


OPT = Opt()
XGLM = Xglm("model.layers", act="activation_function")
BIOGPT = Xglm("biogpt.layers", act="hidden_act")
