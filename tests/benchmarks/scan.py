"""Peak memory and wall time of `mwtool scan` beside a full load with hooks.

    python tests/benchmarks/scan.py --folder /tmp/bench [--cold]

Makes random Llamas (hidden 2048, FFN 5504, bf16; 24 layers are 2.7 GB, 48 are 5.1 GB),
plain and with one dominant row planted in layer 1, and runs both ways as whole processes,
in turn; a third process only imports what both need. Prints medians, and medians of the
pairs' ratios. The rival loads with `from_pretrained` in the stored dtype, hooks every
`down_proj` and decoder layer, and runs the same token. `--cold` drops the weights from
the page cache before every run, as if the model were used for the first time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RIVAL = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
peaks = []
def peak(module, args, output): peaks.append((args[0].abs().max().item(), output.abs().max().item()))
for layer in model.model.layers:
    layer.mlp.down_proj.register_forward_hook(peak)
    layer.register_forward_hook(peak)
with torch.inference_mode():
    model.model(input_ids=torch.tensor([[1]]), use_cache=False)
print(max(peaks))
"""


IMPORTS = "import accelerate; from transformers import AutoTokenizer, LlamaForCausalLM, AutoModelForCausalLM"
HEADER = "model             scan s  full s imports s   ratio  without imports   scan MB  full MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made, and found again")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="evict the weights from the page cache before every run")
    parser.add_argument("--make", nargs=2, metavar=("LAYERS", "PLANTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.folder, int(args.make[0]), planted=args.make[1] == "True")
        return
    print(f"{HEADER}   medians of {args.runs}, {'cold' if args.cold else 'warm'} page cache")
    for planted in (True, False):
        for layers in (24, 48):
            folder = args.folder / f"llama-{layers}{'-planted' if planted else ''}"
            if not (folder / "config.json").exists():
                # In a process of its own: a child's peak memory starts from its parent's.
                command = [sys.executable, __file__, "--folder", str(folder), "--make", str(layers), str(planted)]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            compare(folder, args.runs, cold=args.cold)


def make(folder: Path, layers: int, *, planted: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16, vocab_size=32000
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if planted:
        plant(model)
    model.save_pretrained(folder)


def plant(model: Any, layer: int = 1, row: int = 1234, dim: int = 77) -> None:
    """Make one row answer bos with z of about 400 and write it to one dimension."""
    import torch

    seen = []
    mlp = model.model.layers[layer].mlp
    hook = mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, 0]))
    with torch.no_grad():
        model.model(input_ids=torch.tensor([[1]]), use_cache=False)
        hook.remove()
        direction = seen[0] / seen[0].square().sum()
        mlp.gate_proj.weight[row] = mlp.up_proj.weight[row] = 20 * direction
        mlp.down_proj.weight[dim, row] = 1.0


def compare(folder: Path, runs: int, *, cold: bool) -> None:
    commands = (
        [sys.executable, "-m", "mwtool", "scan", str(folder), "--json"],
        [sys.executable, "-c", RIVAL, str(folder)],
        [sys.executable, "-c", IMPORTS],
    )
    rounds = [[measure(command, folder if cold else None) for command in commands] for _ in range(runs + 1)]
    rounds = rounds[1:]  # the first round warms the page cache
    median = statistics.median
    seconds = [median(one[side][0] for one in rounds) for side in range(3)]
    memory = [median(one[side][1] for one in rounds) for side in range(2)]
    ratio = median(scan[0] / full[0] for scan, full, _ in rounds)
    beyond = median((scan[0] - imports[0]) / (full[0] - imports[0]) for scan, full, imports in rounds)
    print(
        f"{folder.name:<16} {seconds[0]:7.2f} {seconds[1]:7.2f} {seconds[2]:9.2f} {ratio:7.2f} {beyond:16.2f} "
        f"{memory[0]:9.0f} {memory[1]:8.0f}",
        flush=True,
    )


def measure(command: list[str], evict: Path | None) -> tuple[float, float]:
    """Wall seconds and peak resident memory, MB, of a whole process."""
    for file in evict.glob("*.safetensors") if evict else ():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
