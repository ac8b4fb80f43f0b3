"""The model: Llama with another FFN, registered with transformers when this module is imported."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class PebbleConfig(LlamaConfig):
    model_type = "pebble"


class PebbleMLP(nn.Module):
    """Gate and up in one biased matrix, row by row in turn: even rows are the gate, odd rows up."""

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__()
        self.wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.wi(x)  # (..., 2I)
        return self.wo(nn.functional.gelu(both[..., ::2]) * both[..., 1::2])


class PebbleForCausalLM(LlamaForCausalLM):
    config_class = PebbleConfig

    def __init__(self, config: PebbleConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = PebbleMLP(config)
        self.post_init()


AutoConfig.register("pebble", PebbleConfig, exist_ok=True)
AutoModelForCausalLM.register(PebbleConfig, PebbleForCausalLM, exist_ok=True)
