"""gpt-oss: experts stored as (in, out), gate and up interleaved (even columns gate), biases, a clamped GLU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from mwtool.layout import FFN, DecoderLayer, Experts, WeightSlice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

GATE, UP, ALL = slice(None, None, 2), slice(1, None, 2), slice(None)


def clamped_glu(gate: Tensor, up: Tensor, *, limit: float, alpha: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), with gate clamped above at `limit` and up on both sides."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


class GptOss:
    tiny: ClassVar = {
        "gpt_oss": {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    }

    def layer(self, config: PretrainedConfig, index: int) -> DecoderLayer:
        path = f"model.layers.{index}"
        experts = Experts(f"{path}.mlp.experts", router=f"{path}.mlp.router")
        limit, alpha = _stated(config, "swiglu_limit", 7.0), _stated(config, "swiglu_alpha", 1.702)
        combine = partial(clamped_glu, limit=limit, alpha=alpha)
        ffns = tuple(_expert(experts.module, index, combine) for index in range(config.num_local_experts))
        return DecoderLayer(path, ffns, adds=f"{path}.mlp", experts=experts)


def _stated(config: PretrainedConfig, name: str, otherwise: float) -> float:
    """Earlier versions of transformers hard-code both numbers in the model."""
    return float(getattr(config, name, otherwise))


def _expert(experts: str, index: int, combine: partial[Tensor]) -> FFN:
    return FFN(
        up=WeightSlice(f"{experts}.gate_up_proj", (index, ALL, UP), transposed=True),
        gate=WeightSlice(f"{experts}.gate_up_proj", (index, ALL, GATE), transposed=True),
        down=WeightSlice(f"{experts}.down_proj", (index,), transposed=True),
        up_bias=WeightSlice(f"{experts}.gate_up_proj_bias", (index, UP)),
        gate_bias=WeightSlice(f"{experts}.gate_up_proj_bias", (index, GATE)),
        down_bias=WeightSlice(f"{experts}.down_proj_bias", (index,)),
        expert=index,
        combine=combine,
    )


ADAPTER = GptOss()
