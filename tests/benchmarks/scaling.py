"""What a scan costs over depth and width, and an evaluation and an attack over the length of a window.

    PYTHONPATH=.:adapters python tests/benchmarks/scaling.py --folder /tmp/bench [--rounds 3]

Random Llamas in bfloat16 with a vocabulary of 32,000. Times are those of one process in which the sizes take turns:
processor seconds, imports left out, medians over rounds with the least and the most. Peaks of anonymous and of resident
memory, beyond what a process holds before, come from a process for each size. All are also printed as ratios to the
smallest size. Evaluations score the same number of tokens in float32, one window at a time; the attack zeroes three
rows of the middle layer, and its figures include the unchanged model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

DEPTHS, WIDTHS, WINDOWS = (4, 8, 16, 24), (512, 1024, 1536, 2048), (128, 256, 512, 1024)
VOCABULARY, TOKENS = 32_000, 1024
SAMPLES = 0.002
"""Seconds between two looks at a process's memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made, and found again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in all windows of an evaluation together")
    parser.add_argument("--worker", nargs="+", metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, type=int, metavar=("LAYERS", "HIDDEN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.folder, *args.make)
    elif args.worker:
        jobs = [work_of(args.folder, job, args.tokens) for job in args.worker]
        print(json.dumps([peak(job) for job in jobs] if args.peak else times(jobs, args.rounds)))
    else:
        print(about())
        for name, sizes, shape in (
            ("scan, layers", DEPTHS, "scan:{}:1024:0"),
            ("scan, hidden", WIDTHS, "scan:8:{}:0"),
            ("eval, window", WINDOWS, "eval:8:512:{}"),
            ("attack, window", WINDOWS, "attack:8:512:{}"),
        ):
            table(name, sizes, [shape.format(size) for size in sizes], args)


def table(name: str, sizes: Sequence[int], jobs: Sequence[str], args: argparse.Namespace) -> None:
    for job in jobs:
        _, layers, hidden, _ = job.split(":")
        made(args.folder, int(layers), int(hidden))
    seconds = asked(args, jobs)
    peaks = [asked(args, [job], "--peak")[0] for job in jobs]
    load = "" if sys.platform == "win32" else f", load {os.getloadavg()[0]:.1f}"
    print(f"\n{name}: medians of {args.rounds} rounds{load}")
    print("  size   cpu s                  ratio   anonymous MB   ratio   resident MB   ratio")
    medians = [statistics.median(one) for one in seconds]
    for size, one, median, (anonymous, resident) in zip(sizes, seconds, medians, peaks, strict=True):
        spread = f"{median:.3f} [{min(one):.3f}, {max(one):.3f}]"
        print(
            f"{size:6}   {spread:<21} {median / medians[0]:6.2f} {anonymous:14.0f} {anonymous / peaks[0][0]:7.2f}"
            f" {resident:13.0f} {resident / peaks[0][1]:7.2f}",
            flush=True,
        )


def asked(args: argparse.Namespace, jobs: Sequence[str], *flags: str) -> list[list[float]]:
    """What a process of its own measures: seconds of each round, or the two peaks, for each job."""
    command = [sys.executable, __file__, "--folder", str(args.folder), "--worker", *jobs, *flags]
    command += ["--tokens", str(args.tokens), "--rounds", str(args.rounds)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    measured: list[list[float]] = json.loads(found)
    return measured


def times(jobs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in range(rounds + 1):
        for job, found in zip(jobs, seconds, strict=True):
            start = time.process_time()
            job()
            if number:  # the first round warms up
                found.append(time.process_time() - start)
    return seconds


def peak(job: Callable[[], Any]) -> list[float]:
    from mwtool.scan.scanner import scan_checkpoint

    scan_checkpoint("demo")  # imports what is imported late
    before = memory()
    peaks, done = list(before), threading.Event()
    sampler = threading.Thread(target=sampled, args=(peaks, done))
    sampler.start()
    try:
        job()
    finally:
        done.set()
        sampler.join()
    return [high - one for high, one in zip(peaks, before, strict=True)]


def sampled(peaks: list[float], done: threading.Event) -> None:
    while not done.wait(SAMPLES):
        peaks[:] = [max(*pair) for pair in zip(peaks, memory(), strict=True)]


def memory() -> tuple[float, float]:
    """Anonymous and resident memory now, MB; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024, int(fields["VmRSS"].split()[0]) / 1024


def work_of(parent: Path, job: str, tokens: int) -> Callable[[], Any]:
    """job: `scan`, `eval` or `attack`, layers, width and window."""
    from mwtool.scan.scanner import scan_checkpoint

    kind, layers, hidden, window = job.split(":")
    folder = made(parent, int(layers), int(hidden))
    if kind == "scan":
        return partial(scan_checkpoint, str(folder))
    return evaluating(folder, int(window), tokens, attacked=kind == "attack")


def evaluating(folder: Path, window: int, tokens: int, *, attacked: bool) -> Callable[[], Any]:
    import torch

    from mwtool.evaluation.perplexity import perplexity
    from mwtool.evaluation.prefix_reuse import Variant, perplexities
    from mwtool.evaluation.windows import windows
    from mwtool.models.load import load
    from mwtool.surgery.attack import Attack, Edit, edited_together

    torch.set_num_threads(1)
    loaded = load(str(folder), dtype="float32")
    text = (Path(__file__).parents[2] / "mwtool/demo/heldout.txt").read_text(encoding="utf-8")
    tokenizer: Any = loaded.tokenizer
    cut = windows(tokenizer, text, "bos", window, tokenizer.bos_token_id).first(tokens // window)
    layers = [loaded.base.get_submodule(layer.path) for layer in loaded.layers]
    at = len(layers) // 2
    edit = Edit(loaded.layers[at].ffns[0], (0, 1, 2))
    variant = Variant(at, partial(edited_together, loaded.base, [edit], Attack("zero", 3)))
    if attacked:
        return lambda: perplexities(loaded.model, layers, cut, [variant], batch_size=1)
    return lambda: perplexity(loaded.model, cut, batch_size=1)


def made(parent: Path, layers: int, hidden: int) -> Path:
    folder = parent / f"llama-{layers}-{hidden}"
    if not (folder / "tokenizer.json").exists():
        # In a process of its own, which gives its memory back.
        command = [sys.executable, __file__, "--folder", str(folder), "--make", str(layers), str(hidden)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return folder


def make(folder: Path, layers: int, hidden: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=43 * hidden // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer_config.json", "tokenizer.json"):  # last: says that the folder is whole
        shutil.copy(Path(__file__).parents[2] / "mwtool/demo" / name, folder)


def about() -> str:
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one thread"


if __name__ == "__main__":
    main()
