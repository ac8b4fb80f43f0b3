"""A full load with hooks, as one writes it without a library: `python hooks.py MODEL` feeds bos and prints JSON."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
bos = model.config.bos_token_id
seen: dict[tuple[int, str], torch.Tensor] = {}
for at, layer in enumerate(model.model.layers):
    layer.mlp.down_proj.register_forward_hook(
        lambda _module, args, output, at=at: seen.update({(at, "z"): args[0], (at, "w"): output})
    )
    layer.register_forward_hook(lambda _module, _args, output, at=at: seen.update({(at, "h"): output}))
with torch.inference_mode():
    model.model(input_ids=torch.tensor([[1 if bos is None else bos]]), use_cache=False)

peaks = [max((seen[at, what].abs().max().item(), at) for at in range(len(model.model.layers))) for what in "zwh"]
z = seen[peaks[0][1], "z"].flatten().abs().topk(5)
print(json.dumps({"layer": peaks[0][1], "rows": z.indices.tolist(), "values": z.values.tolist(), "h": peaks[2][0]}))
