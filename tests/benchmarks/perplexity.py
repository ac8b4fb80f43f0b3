"""Tokens per second and peak memory of `mwtool.evaluation.perplexity` beside the loop of transformers' documentation.

    python tests/benchmarks/perplexity.py [--shape demo|smollm2|1b|8b] [--device cuda] [--dtype bfloat16]
                                          [--window 4096] [--windows 8] [--rounds 5]
                                          [--ways plain,one,batched,compiled]

| way | what it is |
|---|---|
| `plain` | `model(input_ids, labels=input_ids)`, one window at a time: whole logits, float32 for the loss |
| `one`, `batched`, `batched:N` | ours with one window at once, with as many as mwtool takes by default, with N |
| `compiled`, `compiled:MODE` | ours as `--compile` runs it, once warm; MODE is one of torch.compile's |

All ways measure the same windows on the same model, in rounds whose order rotates; medians, and the ratio to `plain`
in each round with its range. `demo` is the bundled model on its text (windows of 256 tokens at most); the others are
random Llamas of published shapes, made on the device. Memory is what a run holds beyond the model, as the GPU's
allocator counts it. At the end: what compiling took and when it pays, and whether compiled layers see attacked rows.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mwtool.architecture.validate import decoder_layers
from mwtool.errors import MwtoolError
from mwtool.evaluation.compiled import Compilation
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.windows import Windows, windows
from mwtool.models.source import DEMO
from mwtool.surgery.attack import edited, parse_attack
from mwtool_adapters.llama import LLAMA

SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 49_152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 128_256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "vocab_size": 128_256,
    },
}  # fmt: skip
Run = Callable[[Any, Windows], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--window", type=int, default=4096, help="tokens; those of demo are of 256 at most")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="plain,one,batched,compiled")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    transformers.utils.logging.disable_progress_bar()
    model = bundled(args.device, dtype) if args.shape == "demo" else random_llama(args.shape, args.device, dtype)
    cut = cut_for(args.shape, args.window, args.windows)
    say(f"{about(args.device)}, {args.shape} {args.dtype}, {len(cut.ids)} windows of {len(cut.ids[0])} tokens")
    compilations = {way: compilation(model, way) for way in args.ways.split(",") if way.startswith("compiled")}
    compare(model, cut, {way: way_of(way, compilations) for way in args.ways.split(",")}, args)
    for way, compiled in compilations.items():
        if compiled.speed is not None:
            conclude(model, cut, way, compiled)


def say(text: str) -> None:
    """At once, so that a run that is cut off has said what it measured."""
    print(text, flush=True)


def bundled(device: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).to(device).eval()


def random_llama(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Made where it runs and in its dtype: the float32 weights of 8 B parameters would fill half of a GPU."""
    config = LlamaConfig(max_position_embeddings=131_072, **SHAPES[shape])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def cut_for(shape: str, length: int, count: int) -> Windows:
    """The first windows of the bundled text, or random tokens; no padding, so that all ways do the same work."""
    if shape == "demo":
        tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
        text = Path(DEMO / "heldout.txt").read_text(encoding="utf-8")
        whole = windows(tokenizer, text, "bos-4096", min(length, 256), tokenizer.bos_token_id)
        return whole.first(count)
    source = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(SHAPES[shape]["vocab_size"], (length,), generator=source) for _ in range(count))
    return Windows(
        ids=ids,
        scored=(length - 1,) * count,
        sample=tuple(range(count)),
        units=(length - 1,) * count,
        protocol="sun-4096",
        metric="perplexity",
        length=length,
        bos=None,
    )


def compilation(model: Any, way: str) -> Compilation:
    places = decoder_layers(LLAMA, model.config)
    layers, mode = [model.get_submodule(one.path) for one in places], way.partition(":")[2] or None
    if mode == "reduce-overhead":  # outputs of CUDA graphs are overwritten in the next step, which begins here
        layers[0].register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return Compilation(model, layers, mode=mode)


def way_of(name: str, compilations: dict[str, Compilation]) -> Run:
    count = name.removeprefix("batched:")
    size = 1 if name == "one" else int(count) if count.isdigit() else None

    def ours(model: Any, cut: Windows) -> float:
        return perplexity(model, cut, batch_size=size, compiled=compilations.get(name)).value

    return plain if name == "plain" else ours


def plain(model: Any, cut: Windows) -> float:
    """As transformers' documentation measures perplexity: a window at a time, the loss by the model itself."""
    losses = []
    for ids in cut.ids:
        batch = ids[None].to(model.device)
        with torch.no_grad():
            losses.append(model(input_ids=batch, labels=batch).loss * (len(ids) - 1))
    return math.exp(torch.stack(losses).double().sum().item() / sum(cut.scored))


def compare(model: Any, cut: Windows, ways: dict[str, Run], args: argparse.Namespace) -> None:
    tokens = sum(map(len, cut.ids))
    for name, way in list(ways.items()):
        start = time.perf_counter()
        try:
            way(model, cut)
            say(f"warm {name}: {time.perf_counter() - start:.2f} s")
        except MwtoolError as fault:  # without a compiler the other ways are still measured
            say(f"{name} is left out: {fault}")
            del ways[name]
    rounds: list[dict[str, tuple[float, float, float]]] = []
    for number in range(args.rounds):
        first = number % len(ways)
        order = [*ways][first:] + [*ways][:first]
        rounds.append({name: timed(ways[name], model, cut, args.device) for name in order})
        rates = ", ".join(f"{name} {tokens / rounds[-1][name][0]:,.0f}" for name in order)
        say(f"round {number + 1}, tokens/s: {rates}")
        agree([one[2] for one in rounds[-1].values()], args.dtype)
    report(rounds, tokens)


def timed(way: Run, model: Any, cut: Windows, device: str) -> tuple[float, float, float]:
    """Seconds, the allocator's peak in bytes beyond what was there before (on a GPU), and the perplexity."""
    gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = way(model, cut)  # its figure is a number of Python's, so that the device is done
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if gpu else math.nan, value


def agree(values: list[float], dtype: str) -> None:
    tolerance = 1e-5 if dtype == "float32" else 1e-2  # batches of other sizes round differently
    if not max(values) / min(values) - 1 < tolerance:
        raise SystemExit(f"the ways give {values}")


def report(rounds: list[dict[str, tuple[float, float, float]]], tokens: int) -> None:
    median = statistics.median
    base = "plain" if "plain" in rounds[0] else next(iter(rounds[0]))
    say(f"{'way':<36} tokens/s   beyond the model   perplexity   times {base} (range)")
    for name in rounds[0]:
        seconds, memory = (median(one[name][at] for one in rounds) for at in (0, 1))
        ratios = [one[base][0] / one[name][0] for one in rounds]
        held = "not measured" if math.isnan(memory) else f"{memory / 1e6:,.0f} MB"
        faster = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        say(f"{name:<32} {tokens / seconds:12,.0f} {held:>18} {rounds[0][name][2]:12.6g}   {faster}")
    if "batched" in rounds[0]:
        for name in (one for one in rounds[0] if one.startswith("compiled")):
            ratios = [one["batched"][0] / one[name][0] for one in rounds]
            say(f"{name} over batched: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def conclude(model: Any, cut: Windows, way: str, compiled: Compilation) -> None:
    """What compiling took, and whether rows that are attacked in place are seen: beside the uncompiled model."""
    speed = compiled.speed
    assert speed is not None
    say(
        f"{way}: compiled in {speed.seconds:.1f} s, batches of {speed.windows} windows; {speed.after:.4f} s a window, "
        f"uncompiled {speed.before:.4f}; pays after {speed.pays} windows"
    )
    layer = decoder_layers(LLAMA, model.config)[1]
    few = cut.first(2 * speed.windows)
    before = perplexity(model, few)
    with edited(model, layer.ffns[0], range(5), parse_attack("retain:5")):
        found = [perplexity(model, few, compiled=one).nll for one in (None, compiled)]
    change, apart = (
        max(abs(a - b) / n for a, b, n in zip(one, found[0], few.units, strict=True)) for one in (before.nll, found[1])
    )
    say(f"{way}: retain:5 changes a window's loss by up to {change:.2g} nats a token; compiled and not, by {apart:.2g}")


def about(device: str) -> str:
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {where}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
