"""What MacDrop costs of a training step: interleaved pairs of steps, with and without it.

    PYTHONPATH=.:adapters python tests/benchmarks/macdrop.py [--shape demo,1b,8b] [--peft lora,dora] [--device cuda]

A step is forward, backward and AdamW over a LoRA or DoRA of rank 16 on all linear layers, with gradient
checkpointing and autocast, as Trainer runs it; with MacDrop it is inside `MacDrop.step(t)`, which is what
`MacDropCallback` calls. `demo` is the bundled model with its scanned rows; `1b` and `8b` are random Llamas
made on the device in their dtype, with rows taken arbitrarily. Every pair is timed in turn, the one that goes first
alternating. Prints for each model the medians in milliseconds, the median of the pairs' ratios with their quartiles
and with a 95 % interval of that median (order statistics), what masking and restoring take alone, the
difference of the peak memory (CUDA), and the copy of the rows, which is all that MacDrop keeps.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import mwtool.demo
from mwtool import MacDrop, MassiveWeights, scan_model
from mwtool.scan.scanner import decoder_layers
from mwtool_adapters.llama import LLAMA  # by name: the benchmark runs from the sources alone, uninstalled

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 1000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
HEADS = {"tiny": (4, 2), "1b": (32, 8), "8b": (32, 8)}
ROWS = (23, 5, 91, 150, 64)
HEADER = (
    "shape peft     with ms  without ms   ratio  quartiles      95 % of median   alone ms  of a step   "
    "peak +KB  rows KB"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="demo", help=f"one or several of demo, {', '.join(SHAPES)}")
    parser.add_argument("--peft", default="lora,dora", help="one or several of lora, dora")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence; a shorter context gets more sequences")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--macdrop", default="constant:0.5", help="the schedule; p must not be 0")
    args = parser.parse_args()
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"{measured(shape, kind, args)}" for shape in args.shape.split(",") for kind in args.peft.split(",")
    ]  # each frees its model before the next is made
    print(f"\n{place}, {args.dtype}, {args.batch} x {args.tokens} tokens, {args.pairs} pairs, {args.macdrop}; ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    print("\n".join([HEADER, *lines]))


def measured(shape: str, kind: str, args: argparse.Namespace) -> str:
    model, massive = model_of(shape, args)
    steps = 2 * args.pairs + 8  # every step trains, with MacDrop or without
    run = Run(adapted(model, kind), massive, steps, args)
    for with_it in (True, False) * 3:  # the first ones compile, fill caches and make the optimizer's state
        run.step(with_it=with_it)
    pairs = []
    for number in range(args.pairs):
        order = (True, False) if number % 2 else (False, True)
        taken = {with_it: run.step(with_it=with_it) for with_it in order}
        pairs.append((taken[True], taken[False]))
        print(f"{shape} {kind} pair {number + 1}: {taken[True][0]:.1f} ms, {taken[False][0]:.1f} ms", flush=True)
    alone = run.alone()
    line = row(shape, kind, pairs, alone, run.macdrop.kept_bytes)
    del run, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return line


def row(shape: str, kind: str, pairs: list[Any], alone: float, kept: int) -> str:
    median, ratios = statistics.median, sorted(a[0] / b[0] for a, b in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    inner, outer = interval(ratios)
    plain = median(b[0] for _, b in pairs)
    memory = (max(a[1] for a, _ in pairs) - max(b[1] for _, b in pairs)) / 1024
    return (
        f"{shape:<5} {kind:<5} {median(a[0] for a, _ in pairs):10.2f} {plain:11.2f} {median(ratios):7.4f}  "
        f"{low:.4f}-{high:.4f}  {inner:.4f}-{outer:.4f} {alone:10.3f} {alone / plain:10.3%} {memory:10.1f} "
        f"{kept / 1024:8.1f}"
    )


def interval(ordered: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with 95 %, whatever the distribution."""
    n = len(ordered)
    for cut in range((n - 1) // 2, -1, -1):
        if 1 - 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n >= 0.95:
            return ordered[cut], ordered[n - 1 - cut]
    return ordered[0], ordered[-1]


class Run:
    """One model in training, a step at a time."""

    def __init__(self, model: Any, massive: MassiveWeights, steps: int, args: argparse.Namespace) -> None:
        self.model, self.device, self.t = model, torch.device(args.device), 0
        self.dtype = getattr(torch, args.dtype)
        self.macdrop = MacDrop(model, massive, args.macdrop, steps=steps, layers=decoder_layers(LLAMA, model.config))
        assert all(p > 0 for p in self.macdrop.curriculum.values(steps)), "where p is 0 MacDrop does nothing"
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        config = model.config
        length = min(args.tokens, config.max_position_embeddings)
        shape = (max(1, args.batch * args.tokens // length), length)
        self.ids = torch.randint(0, config.vocab_size, shape, device=self.device)

    def step(self, *, with_it: bool) -> tuple[float, int]:
        """Milliseconds of one optimizer step, and the peak of the memory allocated (CUDA)."""
        self.t += 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = self._timed(self._with if with_it else self._train)
        return taken, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def alone(self, times: int = 50) -> float:
        """Median milliseconds of masking and restoring with no training in between."""

        def both() -> None:
            self.macdrop.begin(1)
            self.macdrop.restore()

        return statistics.median(self._timed(both) for _ in range(times))

    def _with(self) -> None:
        with self.macdrop.step(self.t):
            self._loss()
        self._optimize()

    def _train(self) -> None:
        self._loss()
        self._optimize()

    def _loss(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()

    def _optimize(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _timed(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return 1000 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def model_of(shape: str, args: argparse.Namespace) -> tuple[Any, MassiveWeights]:
    if shape == "demo":
        folder = Path(mwtool.demo.__file__).parent
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=args.dtype).to(args.device)
        massive = scan_model(model, adapter=LLAMA).massive
        assert massive is not None, "the bundled model has massive weights"
        return model, massive
    heads, kv_heads = HEADS[shape]
    config = transformers.LlamaConfig(
        **SHAPES[shape], num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    some = (1.0,) * len(ROWS)
    return model, MassiveWeights(
        layer=1,
        module="model.layers.1.mlp",
        expert=None,
        indices=ROWS,
        magnitudes=some,
        shares=some,
        median=0.1,
        count=1,
        share_of_parameters=0.0,
        dimension=0,
        value=1.0,
    )


def adapted(model: Any, kind: str) -> Any:
    """Wrapped by LoRA or DoRA, as Trainer prepares it for gradient checkpointing."""
    options: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(use_dora=kind == "dora", **options))
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped.train()


if __name__ == "__main__":
    main()
