"""nnsight: `python nnsight_trace.py MODEL` traces one sentence and prints JSON.

The trace saves what enters every down projection and every layer's output; the weights are loaded in the checkpoint's
precision, and the sentence goes in as the tokenizer makes it. Named are the layer of the largest value that enters, and
the five largest of that layer at the same token.
"""

import json
import sys

import torch
from nnsight import TransformersModel

model = TransformersModel(sys.argv[1], task="text-generation", device_map="cpu", dispatch=True)
text = "The river rose above its banks in the spring."
with torch.no_grad(), model.trace(text):
    post = list().save()  # noqa: C408 # nnsight saves a list that is made inside the trace
    after = list().save()  # noqa: C408 # likewise
    for block in model.model.layers:
        post.append(block.mlp.down_proj.input[0])
        after.append(block.output[0])

layer = max(range(len(post)), key=lambda at: post[at].abs().max().item())
position = int(post[layer].abs().amax(-1).argmax())
z = post[layer][position].abs().topk(5)
found = {"layer": layer, "rows": z.indices.tolist(), "values": z.values.tolist()}
print(json.dumps({"position": position, **found, "h": max(one.abs().max().item() for one in after)}))
