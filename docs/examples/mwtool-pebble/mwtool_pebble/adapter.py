"""Where Pebble keeps its feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mwtool_pebble.model  # noqa: F401 - registers the type with transformers
from mwtool.layout import FFN, DecoderLayer, WeightSlice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


class Pebble:
    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        wi, wo = f"{path}.mlp.wi", f"{path}.mlp.wo"
        ffn = FFN(
            up=WeightSlice(f"{wi}.weight", (ODD,)),
            gate=WeightSlice(f"{wi}.weight", (EVEN,)),
            down=WeightSlice(f"{wo}.weight"),
            up_bias=WeightSlice(f"{wi}.bias", (ODD,)),
            gate_bias=WeightSlice(f"{wi}.bias", (EVEN,)),
            act="gelu",
            hook=wo,
        )
        return DecoderLayer(path, (ffn,), adds=f"{path}.mlp")


ADAPTER = Pebble()
