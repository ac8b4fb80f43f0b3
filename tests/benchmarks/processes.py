"""Fine-tuning in several processes beside one: the same adapter, the same masks, and tokens per second.

    PYTHONPATH=.:adapters python tests/benchmarks/processes.py [--processes 2] [--shape smollm2] [--device cuda]

Trains the same steps in one process, under DDP and under FSDP2, by torchrun and through `mwtool.finetune.train`, with
the same effective batch. A model of random weights, LoRA on all linear layers, MacDrop on. Prints for each way how far
its adapter is from that of one process (the length of the difference over the length of the update of the B matrices,
which begin at zero), whether all processes drew the same masks, and tokens without padding a second over all devices.
Adam divides gradients by their size, so that rounding shows where a gradient is almost zero: compare in float32.
On a CPU, where processes talk through gloo, accelerate shards nothing: `fsdp2` needs GPUs there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {
    "one": {},
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
}
"""Ways to train, with the settings that `accelerate launch --use_fsdp --fsdp_version 2 ...` hands to its processes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shape", default="smollm2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--effective", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--records", default="alpaca")
    parser.add_argument("--ways", help="one or several of one, ddp, fsdp2; without it all that the device has")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker), args)
        return
    args.ways = args.ways or ("one,ddp" if args.device == "cpu" else ",".join(WAYS))
    with tempfile.TemporaryDirectory() as folder:
        for way in args.ways.split(","):
            launch(way, Path(folder) / way, args)
        print(f"{args.shape}, {args.dtype}, effective batch {args.effective}, {args.steps} steps")
        print("way    processes  sharded  at once  difference  masks  tokens/s  scaling")
        for way in args.ways.split(","):
            print(line(way, Path(folder), args))


def launch(way: str, folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir()
    count = 1 if way == "one" else args.processes
    command = [sys.executable, "-W", "ignore"]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    given = [__file__, *sys.argv[1:], "--worker", str(folder)]
    done = subprocess.run(
        [*command, *given],
        env={**os.environ, **WAYS[way]},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"{way} failed:\n{done.stderr[-6000:]}", flush=True)


def line(way: str, folder: Path, args: argparse.Namespace) -> str:
    import torch
    from safetensors.torch import load_file

    files = sorted((folder / way).glob("rank-*.json"))
    if not (folder / way / "adapter" / "adapter_model.safetensors").exists() or not files:
        return f"{way:<6} failed"
    found = [json.loads(file.read_text()) for file in files]
    first = json.loads((folder / "one" / "rank-0.json").read_text())
    ours, theirs = (
        load_file(folder / one / "adapter" / "adapter_model.safetensors") for one in (way, args.ways.split(",")[0])
    )
    b = [name for name in theirs if "lora_B" in name]
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in b]).norm()
    update = torch.cat([theirs[name].flatten() for name in b]).norm()
    masks = "same" if all(one["masks"] == first["masks"] for one in found) else "OTHER"
    speed, sharded = found[0]["speed"], "yes" if found[0]["sharded"] else "no"
    what = f"{way:<6} {len(found):9d} {sharded:>8} {found[0]['at_once']:8d}"
    return f"{what} {apart / update:11.2e} {masks:>6} {speed:9,.0f} {speed / first['speed']:8.2f}"


def work(folder: Path, args: argparse.Namespace) -> None:
    """What each process does."""
    import torch
    from finetune import massive, model_of, sequences, with_adapter  # the benchmark beside this one
    from torch.distributed.tensor import DTensor

    from mwtool.finetune.batch_size import fitted
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.trainer import Telling, train
    from mwtool.macdrop.engine import MacDrop

    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(args.device)
    masks, original = hashlib.sha256(), MacDrop.mask

    def mask(self: Any, *given: Any) -> Any:
        drawn = original(self, *given)
        masks.update(drawn.numpy().tobytes())
        return drawn

    MacDrop.mask = mask  # type: ignore[method-assign]
    recipe = Recipe(
        batch_size="auto" if args.batch_size == "auto" else int(args.batch_size),
        effective_batch=args.effective,
        epochs=1,
        eval_share=0,
        dtype=args.dtype,
    )
    data = sequences(args.shape, args)
    model = model_of(args.shape, args)
    if args.dtype == "float32":
        model = model.float()
    wrapped = with_adapter(model, recipe)
    recipe = fitted(wrapped, data, recipe, processes=count)
    times: dict[int, float] = {}

    def on_step(at: Any) -> None:
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        times.setdefault(at.step, time.perf_counter())

    telling = Telling(logging_steps=1, save_steps=10**6, on_step=on_step)
    train(wrapped, (data, None), massive(), recipe, folder / "adapter", telling=telling, processes=count)
    tokens = sum(len(ids) for ids in data.ids[args.warm * args.effective :])
    speed = tokens / (times[args.steps] - times[args.warm]) if rank == 0 else 0.0
    sharded = any(isinstance(one, DTensor) for one in wrapped.parameters())
    said = {"sharded": sharded, "masks": masks.hexdigest(), "speed": speed, "at_once": recipe.at_once}
    (folder / f"rank-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
