"""Models of 7, 70 and 405 billion parameters, by their published shapes: what a scan of them reads and holds.

The checkpoints have true headers and no data: files made long by `truncate`, which take no space where nothing is
written. What is not read costs nothing, so that a test takes seconds.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from mwtool.scan.plan import plan_scan

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="truncate writes zeros there")

THIRD = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "bos_token_id": 128000}
ORDER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "7B": {
        **dict(zip(ORDER, (4096, 11008, 32, 32), strict=True)),
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
    },
    "70B": {**dict(zip(ORDER, (8192, 28672, 80, 64), strict=True)), **THIRD},
    "405B": {**dict(zip(ORDER, (16384, 53248, 126, 128), strict=True)), **THIRD},
}
"""As the configurations of Llama-2-7b, Llama-3.1-70B and Llama-3.1-405B have them."""
WHOLE = {"7B": 13_476_831_232, "70B": 141_107_412_992, "405B": 811_706_777_600}
"""Bytes of the weights: 2 for each of the 6,738,415,616, 70,553,706,496 and 405,853,388,800 published parameters."""


def layer_tensors(shape: dict[str, int]) -> dict[str, list[int]]:
    """The tensors of a Llama layer."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "input_layernorm": [width],
        "mlp.down_proj": [width, inner],
        "mlp.gate_proj": [inner, width],
        "mlp.up_proj": [inner, width],
        "post_attention_layernorm": [width],
        "self_attn.k_proj": [heads, width],
        "self_attn.o_proj": [width, width],
        "self_attn.q_proj": [width, width],
        "self_attn.v_proj": [heads, width],
    }


def layer_bytes(size: str) -> int:
    """What is read of a layer: all but queries and keys."""
    tensors = layer_tensors(SHAPES[size])
    return 2 * sum(prod(shape) for name, shape in tensors.items() if "q_proj" not in name and "k_proj" not in name)


def write_file(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file of bfloat16 zeros that are not written."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def sparse(folder: Path, size: str) -> Path:
    """A checkpoint of this size, a file a layer."""
    shape = SHAPES[size]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    table = [shape["vocab_size"], shape["hidden_size"]]
    files = {
        "first.safetensors": {"model.embed_tokens.weight": table},
        "last.safetensors": {"model.norm.weight": table[1:], "lm_head.weight": table},
    }
    for layer in range(shape["num_hidden_layers"]):
        names = {f"model.layers.{layer}.{name}.weight": one for name, one in layer_tensors(shape).items()}
        files[f"layer-{layer:03}.safetensors"] = names
    for file, tensors in files.items():
        write_file(folder / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


MEASURED = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(child, 0)
assert status == 0, status
print(used.ru_maxrss)
"""
"""Runs a command and prints its peak."""


@pytest.mark.parametrize("size", SHAPES)
def test_a_plan_counts_the_published_parameters_and_reads_headers_alone(tmp_path: Path, size: str) -> None:
    folder = sparse(tmp_path, size)
    shape = SHAPES[size]
    layer, row = layer_bytes(size), 2 * shape["hidden_size"]
    every = plan_scan(str(folder))
    table = shape["vocab_size"] * row
    assert [one.parameter for one in every.unread] == ["self_attn.q_proj.weight", "self_attn.k_proj.weight"]
    assert every.size + every.spared - row + 2 * table + row == WHOLE[size]  # both tables, and the last norm
    assert (every.size, every.largest) == (row + shape["num_hidden_layers"] * layer, layer)
    first = sum(part.size for part in every.parts[:17])
    assert first == row + 16 * layer
    assert {"7B": every.size, "70B": first, "405B": first}[size] < {"7B": 11e9, "70B": 25e9, "405B": 95e9}[size]
    assert every.largest < 6e9


def test_a_scan_of_70_billion_parameters_never_holds_two_layers(tmp_path: Path) -> None:
    folder = sparse(tmp_path, "70B")
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 10e6  # on the disk it is next to nothing
    layer = layer_bytes("70B")
    command = [sys.executable, "-m", "mwtool", "scan", str(folder), "--layers", "0-1", "-o", str(tmp_path / "scan")]
    # from a small process: what a process has held before it becomes another program counts as the other's peak
    measured = subprocess.run([sys.executable, "-S", "-c", MEASURED, *command], stdout=subprocess.PIPE, check=True)
    assert json.loads((tmp_path / "scan").read_text())["layers_walked"] == 2
    peak = int(measured.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert layer < peak < 1.5 * layer  # 1.7 GB a layer, and what Python and torch take
