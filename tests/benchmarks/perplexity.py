"""Tokens per second and peak memory of `mwtool.evaluation.perplexity` beside the loop that published code uses.

    python tests/benchmarks/perplexity.py [--shape demo|1b|8b] [--device cuda] [--dtype bfloat16]
                                          [--window 4096] [--windows 8] [--pairs 5]

The reference runs one window at a time, takes its logits whole in float32, and averages the shifted cross-entropy.
Both measure the same windows on the same model, in pairs whose order alternates; medians, and medians of the pairs'
ratios. `demo` is the bundled model on its text (its windows are of 256 tokens at most); `1b` and `8b` are random
Llamas of these sizes, with a vocabulary of 128,256, made on the device. Memory is what a run holds beyond the model,
as the GPU's allocator counts it. The last figure is about ours: seconds a token over four times the windows, beside
those over the fewer.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.windows import Windows, windows
from mwtool.models.source import DEMO

SHAPES = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
VOCABULARY = 128_256
Run = Callable[[Any, Windows], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--window", type=int, default=4096, help="tokens; those of demo are of 256 at most")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="ours; as mwtool chooses by default")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    transformers.utils.logging.disable_progress_bar()
    model = bundled(args.device, dtype) if args.shape == "demo" else random_llama(args.shape, args.device, dtype)
    few, many = (cut(args.shape, args.window, count) for count in (args.windows, 4 * args.windows))
    print(f"{about(args.device)}, {args.shape} {args.dtype}, {len(few.ids)} windows of {len(few.ids[0])} tokens")
    compare(model, few, many, args)


def bundled(device: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).to(device).eval()


def random_llama(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Made where it runs and in its dtype: the float32 weights of 8 B parameters would fill half of a GPU."""
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=131_072, **SHAPES[shape])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def cut(shape: str, length: int, count: int) -> Windows:
    """The first windows of the bundled text, or random tokens; no padding, so that both sides do the same work."""
    if shape == "demo":
        tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
        text = Path(DEMO / "heldout.txt").read_text(encoding="utf-8")
        whole = windows(tokenizer, text, "bos-4096", min(length, 256), tokenizer.bos_token_id)
        return whole.first(count)
    source = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(VOCABULARY, (length,), generator=source) for _ in range(count))
    return Windows(
        ids=ids,
        scored=(length - 1,) * count,
        sample=tuple(range(count)),
        units=(length - 1,) * count,
        protocol="sun-4096",
        metric=length,
        length=None,
    )


def reference(model: Any, cut: Windows) -> float:
    """What published code does: a window at a time, whole logits, float32, shifted."""
    losses = []
    with torch.no_grad():
        for ids in cut.ids:
            batch = ids[None].to(model.device)
            logits = model(batch, use_cache=False).logits
            shifted = logits[:, :-1, :].contiguous().float()
            loss = cross_entropy(shifted.view(-1, shifted.size(-1)), batch[:, 1:].reshape(-1))
            losses.append(loss.float() * (len(ids) - 1))
    return math.exp(torch.stack(losses).sum().item() / sum(cut.scored))


def compare(model: Any, few: Windows, many: Windows, args: argparse.Namespace) -> None:
    def ours(model: Any, cut: Windows) -> float:
        return perplexity(model, cut, batch_size=args.batch_size).value

    sides: tuple[Run, Run] = (ours, reference)
    warm = few.first(2)
    for side in sides:
        side(model, warm)
    rounds = []
    for pair in range(args.pairs):
        order = sides if pair % 2 == 0 else sides[::-1]
        found = {side: timed(side, model, few, args.device) for side in order}
        rounds.append([found[side] for side in sides])
        agree(rounds[-1][0][2], rounds[-1][1][2], args.dtype)
    longer = statistics.median(timed(ours, model, many, args.device)[0] for _ in range(3)) / sum(map(len, many.ids))
    report(rounds, sum(map(len, few.ids)), longer)


def timed(side: Run, model: Any, cut: Windows, device: str) -> tuple[float, float, float]:
    """Seconds, the allocator's peak in bytes beyond what was there before (on a GPU), and the perplexity."""
    gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = side(model, cut)  # its figure is a number of Python's, so that the device is done
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if gpu else math.nan, value


def agree(one: float, other: float, dtype: str) -> None:
    tolerance = 1e-5 if dtype == "float32" else 1e-2  # batches of other sizes round differently
    if not abs(one / other - 1) < tolerance:
        raise SystemExit(f"the two ways give {one} and {other}")


def report(rounds: list[list[tuple[float, float, float]]], tokens: int, longer: float) -> None:
    median = statistics.median
    seconds = [median(one[side][0] for one in rounds) for side in range(2)]
    memory = [median(one[side][1] for one in rounds) / 1e6 for side in range(2)]
    ratios = [one[1][0] / one[0][0] for one in rounds]
    print("             tokens/s   beyond the model   perplexity")
    for name, side in (("mwtool", 0), ("reference", 1)):
        held = "not measured" if math.isnan(memory[side]) else f"{memory[side]:,.0f} MB"
        print(f"{name:<10} {tokens / seconds[side]:10,.0f} {held:>18}   {rounds[0][side][2]:.6g}")
    less = "" if math.isnan(memory[0]) else f", {memory[0] / memory[1]:.2f} of the memory"
    print(
        f"{len(rounds)} pairs: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times its speed{less}; ",
        end="",
    )
    print(f"over four times the windows a token takes {longer * tokens / seconds[0]:.2f} of the time")


def about(device: str) -> str:
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {where}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
