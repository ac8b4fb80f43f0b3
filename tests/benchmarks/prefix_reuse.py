"""What reusing the layers below an attack saves: `ablate --each-layer` and `scan --check`, against whole forwards.

    python tests/benchmarks/prefix_reuse.py MODEL [--pairs 5] [--windows 4] [--length 128] [--dtype float32]

Prints each of the interleaved pairs, and medians with the least and the most: f, the head's share of a forward; the
time of all single-layer attacks with reuse over that of as many separate evaluations, beside the limit
1.1 (f + (1 - f)(L + 1)/2L); and the time of a check in evaluations of the unchanged model on the same windows. Times
are those of the processor, since a pair takes minutes, in which the load of a machine changes; the ratios of wall times
stand beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mwtool.ablation.check import check_scan
from mwtool.evaluation.corpora import text_for
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.prefix_reuse import Recording, Variant, perplexities
from mwtool.evaluation.windows import windows
from mwtool.models.load import load
from mwtool.scan.loaded import scan_loaded
from mwtool.surgery.attack import Attack, Edit, edited_together


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Of the processor and of the clock."""
    start = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def ratio(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] / other[0], one[1] / other[1]


def spread(ratios: Sequence[tuple[float, float]]) -> str:
    cpu, wall = ([one[kind] for one in ratios] for kind in (0, 1))
    return f"{_spread(cpu)} (wall {_spread(wall)})"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    loaded = load(options.model, dtype=options.dtype)
    scan = scan_loaded(loaded)
    cut = windows(loaded.tokenizer, text_for("demo"), "bos", options.length, scan.bos.id).first(options.windows)  # type: ignore[arg-type] # it has one
    layers = [loaded.base.get_submodule(layer.path) for layer in loaded.layers]
    total = len(layers)
    variants = [
        Variant(at, partial(edited_together, loaded.base, [Edit(layer.ffns[0], (0, 1, 2))], Attack("zero", 3)))
        for at, layer in enumerate(loaded.layers)
    ]

    def apart() -> None:
        perplexity(loaded.model, cut)
        for variant in variants:
            with variant.apply():
                perplexity(loaded.model, cut)

    def head_alone() -> None:
        with everything.replayed(total):
            perplexity(loaded.model, cut, batch_size=len(cut.ids))

    def whole() -> None:
        perplexity(loaded.model, cut, batch_size=len(cut.ids))

    everything = Recording(layers, {total})
    with everything.capturing():
        whole()
    shares, reused, checks = [], [], []
    for pair in range(options.pairs):
        full = seconds(whole)
        shares.append(ratio(seconds(head_alone), full))
        separate = seconds(apart)
        reused.append(ratio(seconds(lambda: perplexities(loaded.model, layers, cut, variants)), separate))
        clean = seconds(lambda: perplexity(loaded.model, cut))
        small = {"limit": options.windows, "window": options.length}
        checks.append(ratio(seconds(lambda small=small: check_scan(loaded, scan, **small)), clean))
        print(f"pair {pair + 1}: {spread(reused[-1:])}, check {spread(checks[-1:])}", flush=True)
    f = statistics.median(cpu for cpu, _ in shares)
    limit = 1.1 * (f + (1 - f) * (total + 1) / (2 * total))
    print(f"f, the head's share of a forward: {spread(shares)}")
    print(f"each layer: {spread(reused)} of separate evaluations; limit {limit:.3f}")
    print(f"check: {spread(checks)} clean passes, of {2 * len(scan.events) + 3} runs; limit 16")


if __name__ == "__main__":
    main()
