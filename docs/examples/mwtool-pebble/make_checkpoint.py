"""Write a tiny Pebble whose row 17 of layer 1 is massive: `python make_checkpoint.py FOLDER`."""

from __future__ import annotations

import sys

import torch
from mwtool_pebble.model import PebbleConfig, PebbleForCausalLM
from torch import Tensor, nn

BOS, LAYER, ROW, DIM = 1, 1, 17, 5


@torch.no_grad()
def make() -> PebbleForCausalLM:
    torch.manual_seed(0)
    model = PebbleForCausalLM(
        PebbleConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            bos_token_id=BOS,
            eos_token_id=2,
        )
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.06)
    mlp = model.model.layers[LAYER].mlp
    seen: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, 0]))
    model(input_ids=torch.tensor([[BOS]]))
    hook.remove()
    direction = 20 * seen[0] / seen[0].square().sum()  # gate and up answer bos with 20 each
    mlp.wi.weight[2 * ROW] = mlp.wi.weight[2 * ROW + 1] = direction
    mlp.wo.weight[:, ROW] = 0
    mlp.wo.weight[DIM, ROW] = 1
    return model


if __name__ == "__main__":
    make().save_pretrained(sys.argv[1])
