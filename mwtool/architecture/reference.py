"""A reference implementation of the FFN, computed from the weight slices of an architecture adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mwtool.architecture.layout import FFN

if TYPE_CHECKING:
    from torch import Tensor, nn


def recompute(ffn: FFN, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the FFN from its weight slices: the intermediate state, (..., I), and the output, (..., H).

    x: input of the FFN, (..., H), in the model's dtype.
    """
    from torch.nn.functional import linear
    from transformers.activations import ACT2FN

    up = linear(x, ffn.up.read(model), None if ffn.up_bias is None else ffn.up_bias.read(model))
    if ffn.gate is None:
        z = ACT2FN[ffn.act](up)
    else:
        gate = linear(x, ffn.gate.read(model), None if ffn.gate_bias is None else ffn.gate_bias.read(model))
        z = ACT2FN[ffn.act](gate) * up if ffn.combine is None else ffn.combine(gate, up)
    return z, linear(z, ffn.down.read(model), None if ffn.down_bias is None else ffn.down_bias.read(model))
