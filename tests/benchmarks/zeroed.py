"""What the perplexity loses without what a tool names: single entries of down projections, or whole rows.

    PYTHONPATH=.:adapters python tests/benchmarks/zeroed.py MODEL --entries 11:507:1229 2:507:90 --rows 11:1229 11:1487

`--entries LAYER:DIM:COLUMN ...` zeroes these entries of `down_proj` together, `--rows LAYER:ROW ...` these rows of
`up_proj` and `gate_proj`; both may be repeated, each time for another set. Prints the ratio to the unchanged model with
its 95 % interval over windows of the bundled text, in float32.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from mwtool.evaluation.comparison import paired_ratio
from mwtool.evaluation.corpora import text_for
from mwtool.evaluation.measurement import Measured, perplexity_of
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.windows import windows
from mwtool.models.bos import find_bos
from mwtool.models.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--entries", nargs="+", action="append", default=[], metavar="LAYER:DIM:COLUMN")
    parser.add_argument("--rows", nargs="+", action="append", default=[], metavar="LAYER:ROW")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    loaded = load(args.model, dtype="float32")
    bos = find_bos("auto", loaded.tokenizer, loaded.base.config)
    tokenizer: Any = loaded.tokenizer
    cut = windows(tokenizer, text_for("demo"), "bos", args.length, bos.id).first(args.windows)

    def measured() -> Measured:
        found = perplexity(loaded.model, cut)
        return Measured(task="ppl:demo", seconds=0.0, **perplexity_of("perplexity", found))

    whole = measured()
    print(f"unchanged: {whole.value:.2f}, {args.windows} windows of {args.length}")
    for names in (*args.entries, *args.rows):
        places = [place for name in names for place in places_of(loaded, [int(part) for part in name.split(":")])]
        kept = [weight[at].clone() for weight, at in places]
        for weight, at in places:
            weight[at] = 0
        ratio = paired_ratio(measured(), [whole])
        for (weight, at), values in zip(places, kept, strict=True):
            weight[at] = values
        print(f"{' '.join(names)}: {ratio}", flush=True)


def places_of(loaded: Any, name: list[int]) -> list[tuple[torch.Tensor, Any]]:
    ffn = loaded.base.get_submodule(loaded.layers[name[0]].path).mlp
    if len(name) == 3:
        return [(ffn.down_proj.weight.data, (name[1], name[2]))]
    return [(one.weight.data, name[1]) for one in (ffn.up_proj, ffn.gate_proj)]


if __name__ == "__main__":
    main()
