"""Wall time of one sweep of `mwtool ablate` beside as many separate `mwtool eval --attack` commands.

    python tests/benchmarks/ablate.py [--model demo] [--runs 3]

2 modes times 5 k, whole processes, in turn: a sweep, then the ten commands, and again. The sweep leaves its
controls out, which the commands do not measure either; a third figure is the sweep with controls. Prints medians
and the median of the pairs' ratios, and checks that both ways give the same perplexities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

MODES, KS = ("zero", "retain"), (0, 1, 3, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--controls", action="store_true", help="also time the sweep with its controls")
    args = parser.parse_args()
    pairs = []
    for _ in range(args.runs):
        seconds, swept = sweep(args.model, "--no-controls")
        apart = [evaluated(args.model, f"{mode}:{k}") for mode in MODES for k in KS]
        same(swept, [value for _, value in apart])
        pairs.append((seconds, sum(one for one, _ in apart)))
        print(
            f"sweep {seconds:6.1f} s   {len(apart)} commands {pairs[-1][1]:6.1f} s   {seconds / pairs[-1][1]:.0%}",
            flush=True,
        )
    median = statistics.median
    print(
        f"medians of {args.runs}: sweep {median(one for one, _ in pairs):.1f} s, commands "
        f"{median(one for _, one in pairs):.1f} s, ratio {median(a / b for a, b in pairs):.0%}"
    )
    if args.controls:
        print(f"sweep with controls {sweep(args.model, '--controls')[0]:.1f} s")


def sweep(model: str, *options: str) -> tuple[float, list[float]]:
    modes = [part for mode in MODES for part in ("--mode", mode)]
    seconds, document = run("ablate", model, *modes, "-k", ",".join(map(str, KS)), *options)
    return seconds, [one["results"]["ppl:demo"] for one in document["runs"] if one["control"] is None]


def evaluated(model: str, attack: str) -> tuple[float, float]:
    seconds, document = run("eval", model, "--task", "ppl:demo", "--attack", attack)
    return seconds, document["results"][0]["value"]


def run(*arguments: str) -> tuple[float, Any]:
    """Seconds of a whole process, and the document it printed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "mwtool", *arguments, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start, json.loads(done.stdout)


def same(ours: list[float], theirs: list[float]) -> None:
    off = max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))
    if off > 1e-6:  # the same windows in the same batches
        raise SystemExit(f"the two ways differ by {off:.1e}")


if __name__ == "__main__":
    main()
