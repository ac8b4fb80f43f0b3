"""Wall time, processor time and peak memory of `mwtool scan` beside a full load with hooks.

    python tests/benchmarks/scan.py --folder /tmp/bench [--cold] [--layers 24]

Makes random Llamas (hidden 2048, FFN 5504, bf16; 24 layers are 2.7 GB, 48 are 5.1 GB),
plain and with one dominant row planted in layer 1, and runs both ways as whole processes,
in turn; a third process only imports torch, transformers and the model's class. The rival
loads with `from_pretrained` in the stored dtype, hooks every `down_proj` and decoder layer,
and runs the same token. `--cold` drops the weights from the page cache before every run.

Prints medians, medians of the pairs' ratios, and the load of the machine: where it is
busy, processor time (user and system) tells more than wall time. Anonymous memory is
sampled; resident memory counts the pages that are mapped from files too.
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


IMPORTS = "import torch, transformers; from transformers import LlamaForCausalLM"
HEADER = (
    "model             wall s: scan  full  imports  ratio   cpu s: scan  full  imports  ratio"
    "   anonymous MB: scan full   resident MB: scan full"
)
SAMPLES = 0.02
"""Seconds between two looks at a process's memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made, and found again")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="evict the weights from the page cache before every run")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 48], help="sizes to run")
    parser.add_argument("--make", nargs=2, metavar=("LAYERS", "PLANTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.folder, int(args.make[0]), planted=args.make[1] == "True")
        return
    print(f"{HEADER}\nmedians of {args.runs}, {'cold' if args.cold else 'warm'} page cache")
    for planted in (True, False):
        for layers in args.layers:
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
    rounds = rounds[1:]  # the first round warms the page cache, and compiles modules
    median = statistics.median
    columns = []
    for of in (0, 1):
        columns += [median(one[side][of] for one in rounds) for side in range(3)]
        columns.append(median(scan[of] / full[of] for scan, full, _ in rounds))
    columns += [median(one[side][of] for one in rounds) for of in (2, 3) for side in range(2)]
    widths = "{:13.2f} {:5.2f} {:8.2f} {:6.3f} {:13.2f} {:5.2f} {:8.2f} {:6.3f} {:18.0f} {:4.0f} {:19.0f} {:4.0f}"
    load = "" if sys.platform == "win32" else f"   load {os.getloadavg()[0]:.1f}"
    print(f"{folder.name:<16} {widths.format(*columns)}{load}", flush=True)


def measure(command: list[str], evict: Path | None) -> tuple[float, float, float, float]:
    """Wall seconds, processor seconds, peaks of anonymous and of resident memory, MB, of a whole process."""
    for file in evict.glob("*.safetensors") if evict else ():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, anonymous(process.pid))
        time.sleep(SAMPLES)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed with status {status}")
    return seconds, usage.ru_utime + usage.ru_stime, peak, usage.ru_maxrss / 1024


def anonymous(pid: int) -> float:
    """Anonymous memory of a process now, MB; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


if __name__ == "__main__":
    main()
