"""Wall time, processor time and peak memory of `mwtool scan` beside other ways to find what it finds.

    python tests/benchmarks/scan.py --folder /tmp/bench [--layers 24] [--cold] [--ways hooks imports super-weights]
    python tests/benchmarks/scan.py --model SMOLLM2 --ways transformer-lens nnsight --python ENV/bin/python

Makes random Llamas (hidden 2048, FFN 5504, bf16; 24 layers are 2.7 GB, 48 are 5.1 GB) with the tokenizer of the
bundled model, one with a dominant row planted in layer 1 and one without, or takes `--model`. Runs every way as a
process of its own, in turn. `--ways` names the others; their programs, written as their users would, are in `rivals/`:

hooks             `from_pretrained` in the stored dtype, hooks on every `down_proj` and layer, bos alone
imports           only torch, transformers and the model's class
super-weights     float16, hooks on every `down_proj`, a sentence, the entries between two spikes (Yu et al.)
transformer-lens  TransformerBridge in float32, a sentence, a cache of what is compared
nnsight           a trace of a sentence

`--python` is the interpreter of the last two. `--cold` drops the weights from the page cache before every run. Prints
medians and ranges, the medians and ranges of the ratios within a round, and the load of the machine: where it is busy,
processor time (user and system) tells more than wall time. Anonymous memory is sampled; resident memory counts the
pages that are mapped from files too. `--found` prints what each way names, instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMPORTS = "import torch, transformers; from transformers import LlamaForCausalLM"
RIVALS = Path(__file__).parent / "rivals"
OWN_ENVIRONMENT = {"transformer-lens": "lens.py", "nnsight": "nnsight_trace.py"}
WAYS = ("hooks", "imports", "super-weights", *OWN_ENVIRONMENT)
SAMPLES = 0.02
"""Seconds between two looks at a process's memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the models are made, and found again")
    parser.add_argument("--model", type=Path, help="a folder to scan instead")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="evict the weights from the page cache before every run")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 48], help="sizes to run")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["hooks", "imports"])
    parser.add_argument("--python", default=sys.executable, help="interpreter of transformer-lens and nnsight")
    parser.add_argument("--found", action="store_true", help="print what each way names, and measure nothing")
    parser.add_argument("--make", nargs=2, metavar=("LAYERS", "PLANTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.folder, int(args.make[0]), planted=args.make[1] == "True")
        return
    if args.model is None and args.folder is None:
        parser.error("give --folder or --model")
    for folder in [args.model] if args.model else made(args.folder, args.layers):
        commands = {way: command_of(way, folder, args.python) for way in ("scan", *args.ways)}
        if args.found:
            for way, command in commands.items():
                print(
                    f"{way}: {subprocess.run(command, check=True, stdout=-1, stderr=-3, text=True).stdout}", flush=True
                )
            continue
        compare(folder, commands, args.runs, cold=args.cold)


def made(parent: Path, sizes: Sequence[int]) -> list[Path]:
    folders = []
    for planted in (True, False):
        for layers in sizes:
            folder = parent / f"llama-{layers}{'-planted' if planted else ''}"
            if not (folder / "tokenizer.json").exists():
                # In a process of its own: a child's peak memory starts from its parent's.
                command = [sys.executable, __file__, "--folder", str(folder), "--make", str(layers), str(planted)]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            folders.append(folder)
    return folders


def command_of(way: str, folder: Path, python: str) -> list[str]:
    if way == "scan":
        return [sys.executable, "-m", "mwtool", "scan", str(folder), "--json"]
    if way == "imports":
        return [sys.executable, "-c", IMPORTS]
    if way in OWN_ENVIRONMENT:
        return [python, str(RIVALS / OWN_ENVIRONMENT[way]), str(folder)]
    return [sys.executable, str(RIVALS / f"{way.replace('-', '_')}.py"), str(folder)]


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
    for name in ("tokenizer_config.json", "tokenizer.json"):  # last: says that the folder is whole
        shutil.copy(Path(__file__).parents[2] / "mwtool/demo" / name, folder)


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


def compare(folder: Path, commands: dict[str, list[str]], runs: int, *, cold: bool) -> None:
    evict = folder if cold else None
    rounds = [{way: measure(command, evict) for way, command in commands.items()} for _ in range(runs + 1)]
    rounds = rounds[1:]  # the first round warms the page cache, and compiles modules
    load = "" if sys.platform == "win32" else f", load {os.getloadavg()[0]:.1f}"
    print(f"{folder.name}: medians of {runs} [least, most], {'cold' if cold else 'warm'} page cache{load}")
    heads = ("wall s", "cpu s", "scan / way: wall", "cpu", "anonymous MB", "resident MB")
    print(f"{'':<17}" + "".join(f"{head:<21}" for head in heads))
    for way in commands:
        cells = [spread([one[way][of] for one in rounds]) for of in (0, 1)]
        cells += ["" if way == "scan" else spread([one["scan"][of] / one[way][of] for one in rounds]) for of in (0, 1)]
        cells += [f"{statistics.median(one[way][of] for one in rounds):.0f}" for of in (2, 3)]
        print(f"{way:<17}" + "".join(f"{cell:<21}" for cell in cells).rstrip(), flush=True)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


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
