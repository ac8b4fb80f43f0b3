"""Third-party distributions made up on the spot: a module, and metadata that announces it."""

from __future__ import annotations

from pathlib import Path

LAYER = """
from mwtool.layout import FFN, DecoderLayer, WeightSlice, gated_mlp

class Adapter:
    tiny = {{"{type}": {{}}}}

    def layer(self, config, index):
        path = f"model.layers.{{index}}"
        return DecoderLayer(path, ({ffn},), adds=f"{{path}}.mlp")

ADAPTER = Adapter()
"""
MIXTURE = """
from mwtool.layout import DecoderLayer, Experts, fused_experts
from dataclasses import replace

def combine(gate, up):
    {body}

class Adapter:
    def layer(self, config, index):
        path = f"model.layers.{{index}}"
        experts = Experts(f"{{path}}.mlp.experts", router=f"{{path}}.mlp.gate")
        ffns = fused_experts(experts.module, config.num_experts, config.intermediate_size, config.hidden_act)
        ffns = tuple(replace(ffn, combine=combine) for ffn in ffns)
        return DecoderLayer(path, ffns, adds=f"{{path}}.post_feedforward_layernorm", experts=experts)

ADAPTER = Adapter()
"""
"""Of flex_olmo, whose gate and up are combined by a function of the plugin's."""
GOOD = 'gated_mlp(f"{path}.mlp", "silu")'


def source(model_type: str, ffn: str = GOOD) -> str:
    """An adapter module for this type whose only FFN is the expression `ffn`."""
    return LAYER.format(type=model_type, ffn=ffn)


def mixture(body: str) -> str:
    """An adapter module for flex_olmo that combines `gate` and `up` as the function body `body` says."""
    return MIXTURE.format(body=body)


def distribution(folder: Path, name: str, model_type: str, code: str, *, value: str | None = None) -> Path:
    """What pip would leave behind for distribution `name` 1.2 with one adapter; returns the folder."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[mwtool.adapters]\n{model_type} = {value or f'{module}:ADAPTER'}\n")
    return folder
