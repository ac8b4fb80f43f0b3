"""Name and shape of a model, by which a saved scan is recognised as belonging to it."""

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

    model: the module whose parameters `layers` names, with or without memory for its weights. Its intermediate size is
    that of the first layer's first FFN; mixtures may have other widths in other layers.
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
