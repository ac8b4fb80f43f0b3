"""What `--dry-run` tells, held against what is then measured: memory of the process and of the GPU, and time.

    PYTHONPATH=.:adapters python tests/benchmarks/forecast.py [--shape 5m,135m] [--command scan,eval] [--device cuda]

Makes Llamas of random weights in the published shapes, in bfloat16 and with the bundled model's tokenizer, in a
temporary folder (`--folder DIR` keeps them). For each model and command, `mwtool COMMAND --dry-run --json` runs in a
process of its own, with and without `--trial` where there is one, then the command itself, `--runs` times. Prints what
was told, what was measured and their ratio:

process  bytes resident at most: the kernel's own count (VmHWM), read while the process runs
GPU      bytes of tensors at most: torch's allocator, read when the process ends
time     seconds from start to end of the process; of several runs the median

A figure that is not told is left out. The models are in the page cache, since they have just been written.
Exits with 1 if a ratio is outside `--within`, which is 0.15, for memory, and 2 if a command failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "5m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 10, "vocab_size": 4096, "heads": (6, 2)},
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152, "heads": (9, 3),
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256, "heads": (32, 8),
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
        "heads": (32, 8), "tied": False,
    },
}  # fmt: skip
"""The bundled model's, and those of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""
COMMANDS = ("scan", "compare", "eval", "ablate", "quantize-check", "finetune", "finetune-auto")
"""The last with the batch size that trial steps find on a GPU, of which shapes alone tell nothing."""


@dataclass(frozen=True)
class Ran:
    """Of a process: what it printed, bytes resident and on the GPU at most, seconds."""

    printed: str
    process: float
    gpu: float | None
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="5m,135m", help=f"one or several of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="cut the models to this depth")
    parser.add_argument("--command", default=",".join(COMMANDS[:-1]), help=f"one or several of {', '.join(COMMANDS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=8, help="of the text, of eval, ablate and quantize-check")
    parser.add_argument("--window", type=int, default=256, help="tokens of each")
    parser.add_argument("--steps", type=int, default=6, help="of training")
    parser.add_argument("--batch-size", default="4", help="of training")
    parser.add_argument("--no-trial", action="store_true", help="of scan and finetune, what shapes tell only")
    parser.add_argument("--runs", type=int, default=1, help="of each command")
    parser.add_argument("--within", type=float, default=0.15)
    parser.add_argument("--folder", type=Path, help="where models are, and are made if they are not; stays")
    args = parser.parse_args()
    shown = []
    with tempfile.TemporaryDirectory() as aside:
        for shape in args.shape.split(","):
            model = made(shape, (args.folder or Path(aside)).resolve(), args)
            for command in args.command.split(","):
                lines = compared(shape, command, given(command, model, Path(aside), args), args)
                print("\n".join(lines), flush=True)
                shown += lines
            if args.folder is None:
                shutil.rmtree(model)
    import torch
    import transformers

    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"\n{place}, {os.cpu_count()} cores; torch {torch.__version__}, transformers {transformers.__version__}")
    print("shape command         how        what           told   measured   ratio")
    print("\n".join(shown))
    return 2 if any("failed" in line for line in shown) else int(any(line.endswith("OUTSIDE") for line in shown))


def made(shape: str, folder: Path, args: argparse.Namespace) -> Path:
    """A folder with the model."""
    from mwtool.models.source import DEMO

    target = folder / (shape if args.layers is None else f"{shape}-{args.layers}")
    if (target / "config.json").exists():
        return target
    start = time.perf_counter()
    code = (
        "import sys, torch, json; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "given = json.loads(sys.argv[1]); torch.manual_seed(0)\n"
        "with torch.device(sys.argv[2]): model = LlamaForCausalLM._from_config(LlamaConfig(**given)).bfloat16()\n"
        "for at, row in enumerate((3, 5, 8, 13, 21)):\n"  # random weights have no massive rows
        "    model.model.layers[0].mlp.down_proj.weight.data[7, row] = 3e4 * 0.8**at\n"
        "model.save_pretrained(sys.argv[3], max_shard_size='5GB')\n"
    )
    options = dict(SHAPES[shape])
    heads = options.pop("heads")
    options |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "bos_token_id": 0, "eos_token_id": 0}
    options |= {"dtype": "bfloat16", "tie_word_embeddings": options.pop("tied", True), "max_position_embeddings": 8192}
    options |= {} if args.layers is None else {"num_hidden_layers": args.layers}
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(options), args.device, target]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, target)
    print(f"{target.name} made in {time.perf_counter() - start:.0f} s", flush=True)
    return target


def given(command: str, model: Path, aside: Path, args: argparse.Namespace) -> list[str]:
    """What the command is given."""
    device = ["--device", args.device, "--json"]
    measuring = ["--task", "ppl:demo", "--limit", str(args.windows), "--window", str(args.window)]
    found = {
        "scan": [],
        "compare": ["demo"],
        "eval": [*measuring, "--attack", "none", "--attack", "zero:5"],
        "ablate": [*measuring, "--mode", "zero", "--mode", "retain", "-k", "5", "--draws", "1"],
        "quantize-check": [*measuring, "--bits", "4", "-k", "5"],
    }
    if command in found:
        return [command, str(model), *found[command], *device]
    data = aside / "records.jsonl"
    data.write_text("\n".join(json.dumps(record) for record in records()))
    training = ["--data", str(data), "--max-steps", str(args.steps), "--effective-batch", "8", "--max-length", "256"]
    if command == "finetune":  # all that trial steps would find is given, so that shapes tell the memory
        training += ["--batch-size", args.batch_size, "--no-gradient-checkpointing", "--no-padding-free"]
    return ["finetune", str(model), *training, *device]


def records() -> list[dict[str, str]]:
    """64 records of as many words as Alpaca's have."""
    words = "the man went down to the river and there he saw a boat with no one in it so he sat and waited".split()
    return [
        {"instruction": " ".join(words[at % 7 :]), "output": " ".join((words * 6)[: 20 + 13 * at % 90])}
        for at in range(64)
    ]


def compared(shape: str, command: str, arguments: Sequence[str], args: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    apart = command in ("scan", "compare") or command.startswith(
        "finetune"
    )  # which run nothing unless a trial is asked for
    plain, told = child([*arguments, "--dry-run"]), None
    if apart and not args.no_trial:
        told = child([*arguments, "--dry-run", "--trial"])
    if plain is None or (told is None and apart and not args.no_trial):
        return [f"{shape:<5} {command:<15} dry run failed"]
    runs = []
    for at in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            output = ["-o", str(Path(folder) / f"run-{at}")] if command.startswith("finetune") else []
            ran = child([*arguments, *output])
        if ran is None:
            return [f"{shape:<5} {command:<15} run failed"]
        runs.append(ran)
    measured = {
        "process MB": max(one.process for one in runs) / 1e6,
        "GPU MB": max(one.gpu or 0 for one in runs) / 1e6,
        "time s": statistics.median(one.seconds for one in runs),
    }
    lines = []
    for how, ran in (("by shapes" if apart else "trial", plain), ("trial", told)):
        if ran is not None:
            forecast = figures(json.loads(ran.printed))
            shown = {name: value for name, value in measured.items() if value and (name != "time s" or how == "trial")}
            lines += [
                line(shape, command, how, name, forecast.get(name), value, args.within) for name, value in shown.items()
            ]
            lines.append(f"{shape:<5} {command:<15} {how:<10} took {ran.seconds:.1f} s")
    return lines


def line(shape: str, command: str, how: str, name: str, told: float | None, measured: float, within: float) -> str:
    head = f"{shape:<5} {command:<15} {how:<10} {name:<10}"
    if told is None:
        return f"{head}  not told {measured:10,.1f}"
    ratio = told / measured
    outside = "" if abs(ratio - 1) <= within else "  OUTSIDE" if name != "time s" else "  outside"
    return f"{head}{told:10,.1f} {measured:10,.1f} {ratio:7.3f}{outside}"


def figures(document: Mapping[str, Any]) -> dict[str, float]:
    """What a dry run tells."""
    memory = document["models"][0]["memory"] if "models" in document else document["memory"]
    found = {"process MB": memory.get("process"), "GPU MB": memory.get("gpu")}
    told = {name: value / 1e6 for name, value in found.items() if value}
    return told | ({"time s": document["total_seconds"]} if document.get("total_seconds") else {})


def child(arguments: Sequence[str]) -> Ran | None:
    """Run `mwtool` in a process of its own, and look how much memory it holds."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "gpu"
        command = [sys.executable, "-W", "ignore", __file__, "--as-mwtool", str(left), *arguments]
        with (Path(folder) / "out").open("w+") as out, (Path(folder) / "err").open("w+") as err:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=out, stderr=err)
            peak = 0
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(0.02)
            seconds = time.perf_counter() - start
            out.seek(0)
            err.seek(0)
            if process.returncode:
                print(f"mwtool {' '.join(arguments)} failed:\n{err.read()[-3000:]}", flush=True)
                return None
            gpu = float(left.read_text()) if left.exists() else None
            return Ran(out.read(), peak, gpu, seconds)


def resident(pid: int) -> int:
    """Bytes at most until now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 0 if found is None else 1024 * int(found[1])


def as_mwtool(left: str, arguments: list[str]) -> None:
    """Be `mwtool`, and leave behind what the allocator of the GPU counted, though its count is begun anew at times."""
    import atexit

    seen = [0]

    def look() -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            seen[0] = max(seen[0], torch.cuda.max_memory_allocated())

    def finish() -> None:
        look()
        if seen[0]:
            Path(left).write_text(str(seen[0]))

    atexit.register(finish)
    sys.argv = ["mwtool", *arguments]
    sys.path.pop(0)  # the folder of the benchmarks
    runpy.run_module("mwtool", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-mwtool"]:
        as_mwtool(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
