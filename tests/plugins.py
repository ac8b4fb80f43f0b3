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
GOOD = 'gated_mlp(f"{path}.mlp", "silu")'


def source(model_type: str, ffn: str = GOOD) -> str:
    """An adapter module for this type whose only FFN is the expression `ffn`."""
    return LAYER.format(type=model_type, ffn=ffn)


def distribution(folder: Path, name: str, model_type: str, code: str, *, value: str | None = None) -> Path:
    """What pip would leave behind for distribution `name` 1.2 with one adapter; returns the folder."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[mwtool.adapters]\n{model_type} = {value or f'{module}:ADAPTER'}\n")
    return folder
