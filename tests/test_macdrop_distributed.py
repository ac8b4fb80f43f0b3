"""Two processes: FSDP2 shards and DDP replicas train with MacDrop as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import digest, gradients, massive, small, with_adapter

from mwtool.errors import UnsupportedModel
from mwtool.macdrop import MacDrop

LAYOUTS = {"llama": None, "gpt2": None, "phi3": None, "mixtral": 1}
"""Shard(0) cuts rows, input columns, gate from up, and experts."""


def prepared(model_type: str) -> tuple[nn.Module, nn.Module, Any]:
    base = small(model_type)
    model = with_adapter(base, target_modules=["q_proj", "k_proj"] if model_type == "mixtral" else "all-linear")
    return model, base, massive(base, 1, LAYOUTS[model_type])


def main(way: str, model_type: str, folder: Path) -> None:
    """What each of two processes does: one step's gradients, and the weights before, inside and after."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, base, rows = prepared(model_type)
    running: nn.Module = model
    if way == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in list(base.get_submodule("transformer.h" if model_type == "gpt2" else "model.layers").children()):
            fully_shard(layer)
        fully_shard(model)
    else:
        running = nn.parallel.DistributedDataParallel(model)
    before = {name: full(p) for name, p in model.named_parameters() if "lora_" not in name}
    macdrop = MacDrop(running, rows, "constant:0.6", steps=5)
    with macdrop.step(2):
        inside = {name: full(p) for name, p in model.named_parameters() if name in before}
        found = {name: full(g) for name, g in gradients(running).items()}
    after = {name: full(p) for name, p in model.named_parameters() if name in before}
    same = all(torch.equal(before[name], after[name]) for name in before)
    if rank == 0:
        prefix = "module." if way == "ddp" else ""
        torch.save({name.removeprefix(prefix): g for name, g in found.items()}, folder / "gradients.pt")
        torch.save(inside, folder / "inside.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps({"same": same, "masks": macdrop.mask(2).sum().item()}))
    dist.destroy_process_group()


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


@pytest.mark.parametrize(("way", "model_type"), [*[("fsdp2", name) for name in LAYOUTS], ("ddp", "llama")])
def test_two_processes_drop_and_restore_as_one(tmp_path: Path, way: str, model_type: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, way, model_type, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, _base, rows = prepared(model_type)
    before = digest(model)
    macdrop = MacDrop(model, rows, "constant:0.6", steps=5)
    with macdrop.step(2):
        weights = {name: full(p) for name, p in model.named_parameters() if "lora_" not in name}
        expected = gradients(model)
    assert digest(model) == before
    inside = torch.load(tmp_path / "inside.pt")
    assert all(torch.equal(inside[name], weights[name]) for name in weights)
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():  # both processes saw the same batch; their mean is what one gives
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    states = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert states == [{"same": True, "masks": macdrop.mask(2).sum().item()}] * 2


# torch warns of FSDP1 on the CPU, and that it is superseded
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp1_is_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        base = small()
        rows = massive(base)
        wrapped = FullyShardedDataParallel(base, device_id=torch.device("cpu"))
        with pytest.raises(UnsupportedModel, match="FSDP1"):
            MacDrop(wrapped, rows, "step:0.8", steps=3)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
