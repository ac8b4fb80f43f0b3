"""GPT-2, whose matrices are stored as (in, out), GPT-Neo, GPT-BigCode, StarCoder 2, GPT-J and CodeGen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import DecoderLayer, plain_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Gpt2:
    """up, down: names of the two modules. transposed: whether they are Conv1D."""

    tiny: ClassVar = {
        "gpt2": {"n_inner": 48},
        "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
        "gptj": {"rotary_dim": 4},
        "codegen": {"rotary_dim": 4},
    }

    def __init__(self, up: str, down: str, *, transposed: bool = False) -> None:
        self.up, self.down, self.transposed = up, down, transposed

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"transformer.h.{index}"
        mlp, act = f"{path}.mlp", config.activation_function
        return DecoderLayer(path, (plain_mlp(mlp, self.up, self.down, act, transposed=self.transposed),), adds=mlp)


class Starcoder2:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        ffn = plain_mlp(f"{path}.mlp", "c_fc", "c_proj", config.hidden_act, bias=config.use_bias)
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


GPT2 = Gpt2("c_fc", "c_proj", transposed=True)
GPT_NEO = Gpt2("c_fc", "c_proj")
GPTJ = Gpt2("fc_in", "fc_out")
STARCODER2 = Starcoder2()
