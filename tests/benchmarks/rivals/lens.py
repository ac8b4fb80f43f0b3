"""TransformerLens 4: `python lens.py MODEL` runs one sentence with a cache of what is compared, and prints JSON.

It loads in float32 and puts bos in front of a sentence, both by default. Named are the layer of the largest hidden
value of a feed-forward network, and the five largest of that layer at the same token.
"""

import json
import sys

from transformer_lens.model_bridge import TransformerBridge

KINDS = ("mlp.hook_post", "hook_mlp_out", "hook_resid_post")
model = TransformerBridge.boot_transformers(sys.argv[1], device="cpu")
text = "The river rose above its banks in the spring."
_, cache = model.run_with_cache(text, names_filter=lambda name: name.endswith(KINDS))

post = [cache[f"blocks.{layer}.mlp.hook_post"][0] for layer in range(model.cfg.n_layers)]
layer = max(range(len(post)), key=lambda at: post[at].abs().max().item())
position = int(post[layer].abs().amax(-1).argmax())
z = post[layer][position].abs().topk(5)
h = max(cache[f"blocks.{at}.hook_resid_post"].abs().max().item() for at in range(len(post)))
found = {"layer": layer, "rows": z.indices.tolist(), "values": z.values.tolist(), "h": h}
print(json.dumps({"tokens": model.to_tokens(text).shape[1], "position": position, **found}))
