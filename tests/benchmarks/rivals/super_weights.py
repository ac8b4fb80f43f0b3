"""Super weights as in Yu et al.: `python super_weights.py MODEL [--bos]` feeds one sentence and prints JSON.

float16, whole model, hooks on every down projection; where the largest input and the largest output of a layer both
exceed 50, the entry of the weight that joins them is named. The sentence goes in as the tokenizer makes it; `--bos`
puts bos in front where the tokenizer does not. Nothing is plotted.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SPIKE = 50
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The river rose above its banks in the spring.")["input_ids"]
if "--bos" in sys.argv:
    ids = [tokenizer.bos_token_id, *ids]

largest: dict[int, tuple[tuple[float, list[int]], ...]] = {}


def peak(states: torch.Tensor) -> tuple[float, list[int]]:
    at = [int(one) for one in torch.unravel_index(states.abs().float().argmax(), states.shape)]
    return float(states[tuple(at)]), at


for number, layer in enumerate(model.model.layers):
    layer.mlp.down_proj.register_forward_hook(
        lambda _module, args, output, number=number: largest.update({number: (peak(args[0]), peak(output))})
    )
with torch.no_grad():
    model(torch.tensor([ids]))

named = []
for number, ((entered, (_, _, index)), (left, (_, position, dim))) in sorted(largest.items()):
    if abs(entered) > SPIKE and abs(left) > SPIKE:
        value = model.model.layers[number].mlp.down_proj.weight[dim, index].item()
        weight = {"layer": number, "dim": dim, "row": index, "value": value}
        named.append({**weight, "position": position, "z": entered, "w": left})
print(json.dumps({"tokens": len(ids), "super_weights": named}))
