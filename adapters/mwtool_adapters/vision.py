"""Vision-language models that contain a Llama, Qwen or Mistral: only its decoder layers are described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mwtool.layout import DecoderLayer, UnsupportedModel, gated_mlp

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTHS = {"hidden_size": 32, "intermediate_size": 64}
TOWER = {**WIDTHS, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
QWEN = {**WIDTHS, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
GATED = ("llama", "ministral3", "mistral", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text")
"""Language models whose FFN is Llama's."""


class Vision:
    tiny: ClassVar[dict[str, dict[str, Any]]] = {
        "llava": {
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
        },
        "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral", **TOWER}},
        "qwen2_vl": {"text_config": SECTIONS, "vision_config": {**QWEN, "embed_dim": 32, "hidden_size": 32}},
        "qwen2_5_vl": {"text_config": SECTIONS, "vision_config": QWEN},
        "qwen3_vl": {"text_config": SECTIONS, "vision_config": {**QWEN, "deepstack_visual_indexes": [0]}},
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        text = config.get_text_config()
        if text.model_type not in GATED:
            raise UnsupportedModel(
                f"the language model of this {config.model_type} is a {text.model_type}; read are {', '.join(GATED)}"
            )
        path = f"model.language_model.layers.{index}"
        return DecoderLayer(path, (gated_mlp(f"{path}.mlp", text.hidden_act),), adds=f"{path}.mlp")


ADAPTER = Vision()
