"""How long a scan by ranges takes with one connection and with several, in turn, from a server that is slow on purpose.

    python tests/benchmarks/ranges.py --pairs 5

The server is on this machine. It waits before each answer and sends so many bytes a second on each connection, as one
far away does. Each scan is a process of its own with an empty cache; the time is without imports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import hub
import tiny
import torch

SCAN = """
import sys, time
from mwtool.models import fetching
fetching.CONNECTIONS = int(sys.argv[1])
from mwtool.scan.scanner import scan_checkpoint
scan_checkpoint("demo")  # what is imported only once
began = time.perf_counter()
scan_checkpoint("some/model", download="ranges")
print(time.perf_counter() - began)
"""


def seconds(endpoint: str, connections: int) -> float:
    """Of one scan."""
    with tempfile.TemporaryDirectory() as home:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCAN, str(connections)],
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"},
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    return float(ran.stdout)


def main() -> None:
    """Scan in pairs and print the ratio of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=5e6, help="bytes a second of a connection")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": asked.width // 8}
    shape = {"hidden_size": asked.width, "intermediate_size": asked.width * 8 // 3, **heads}
    model = tiny.model("llama", torch.bfloat16, num_hidden_layers=asked.layers, **shape)
    with tempfile.TemporaryDirectory() as folder, hub.serving() as served:
        served.repos["some/model"] = tiny.saved(Path(folder), model, max_shard_size="20MB")
        served.delay, served.rate = asked.delay, asked.rate
        pairs = [(seconds(served.endpoint, 1), seconds(served.endpoint, 8)) for _ in range(asked.pairs)]
    for one, eight in pairs:
        print(f"1 connection {one:.2f} s, 8 connections {eight:.2f} s: {one / eight:.2f} x")
    ratios = [one / eight for one, eight in pairs]
    print(f"median {statistics.median(ratios):.2f} x, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
