"""The name and shape of a model, which are compared with those in a saved scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mwtool.architecture.layout import DecoderLayer
from mwtool.massive import Identity

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def identity_of(
    name: str, revision: str | None, config: PretrainedConfig, layers: Sequence[DecoderLayer], model: nn.Module
) -> Identity:
    """The identity of a model with these decoder layers.

    model: the module whose parameters `layers` names; it may be on the meta device. The intermediate size is that of
    the first FFN of the first layer; MoE models may have other widths in other layers.
    """
    routed = [ffn.expert for layer in layers for ffn in layer.ffns if ffn.expert is not None]
    return Identity(
        model=name,
        revision=revision,
        model_type=config.model_type,
        layers=len(layers),
        hidden_size=config.get_text_config().hidden_size,
        intermediate_size=layers[0].ffns[0].width(model),
        experts=max(routed) + 1 if routed else None,
    )
