"""Two processes: FSDP2 shards and DDP replicas train with MacDrop as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from training import IDS, digest, loss_of, massive, small, with_adapter
from transformers import Trainer, TrainingArguments

from mwtool import MacDropCallback
from mwtool.errors import UnsupportedModel
from mwtool.finetune.token_trainer import trained_state
from mwtool.macdrop.curriculum import curriculum_of
from mwtool.macdrop.engine import MacDrop

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One way to train. keep: weights stay gathered between micro-batches, as FSDP2 can be asked to."""

    way: str
    model_type: str = "llama"
    dora: bool = False
    p: float = 0.6
    expert: int | None = None
    keep: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in (self.way, self.model_type, self.dora, self.p, self.keep))


CASES = [
    Case("ddp"),
    Case("fsdp2"),
    Case("fsdp2", "gpt2"),  # Shard(0) cuts rows in the first, input columns here,
    Case("fsdp2", "phi3"),  # gate from up,
    Case("fsdp2", "mixtral", expert=1),  # and experts
    Case("fsdp2", dora=True),
    Case("fsdp2", dora=True, p=1.0),
    Case("fsdp2", keep=True),
]


def prepared(case: Case) -> tuple[nn.Module, nn.Module, MacDrop]:
    """The model, what is called, and an engine, in the processes there are."""
    base = small(case.model_type)
    targets = ["q_proj", "k_proj"] if case.model_type == "mixtral" else "all-linear"
    options = {"fan_in_fan_out": True} if case.model_type == "gpt2" else {}
    model = with_adapter(base, target_modules=targets, dora=case.dora, trained=case.p < 1, **options)
    rows, running = massive(base, 1, case.expert), model
    if dist.is_initialized():
        running = nn.parallel.DistributedDataParallel(model) if case.way == "ddp" else sharded(model, case)
    curriculum = curriculum_of(f"constant:{case.p}", resample="microbatch")
    return model, running, MacDrop(running, rows, curriculum, steps=5)


def sharded(model: Any, case: Case) -> nn.Module:
    base = model.get_base_model()
    for layer in base.get_submodule("transformer.h" if case.model_type == "gpt2" else "model.layers").children():
        fully_shard(layer, reshard_after_forward=not case.keep)
    fully_shard(model, reshard_after_forward=not case.keep)
    if case.keep:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(reshard_after_backward=False)
    return model  # type: ignore[no-any-return]


def observed(case: Case) -> dict[str, Named]:
    """One step of two micro-batches: weights before, in both, and after; a state dict, and gradients; losses."""
    model, running, macdrop = prepared(case)
    found: dict[str, Named] = {"before": pretrained(model)}
    with macdrop.step(2):
        found["first"] = pretrained(model)
        found["state dict"] = {name: full(value) for name, value in model.state_dict().items()}
        first = loss_of(running, IDS)
        first.backward()
        macdrop.next_microbatch()
        found["second"] = pretrained(model)
        second = loss_of(running, IDS.flip(0))
        second.backward()
    found["after"] = pretrained(model)
    found["gradients"] = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    loss_of(running.eval())  # leaves weights gathered, if asked to
    with macdrop.step(3):
        masked = loss_of(running)
    plain = loss_of(running)
    found["adapter"] = trained_state(model)
    found["losses"] = {"first": first, "second": second, "masked": masked, "plain": plain}
    return {part: {name: full(value) for name, value in values.items()} for part, values in found.items()}


def pretrained(model: nn.Module) -> Named:
    return {name: full(p) for name, p in model.named_parameters() if "lora_" not in name}


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def trained(folder: Path, accumulation: int) -> dict[str, Any]:
    """Three steps of Trainer, two sequences each, over the processes there are."""
    base = small()
    model = with_adapter(base)
    before = digest(model)
    callback = MacDropCallback(massive(base), "step:0.8")
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (6, 6), generator=torch.Generator())]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.engine is not None
    adapter = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return {
        "same": digest(model) == before,
        "processes": arguments.world_size,
        "p": list(callback.engine.history.values()),
        "adapter": adapter.tolist(),
    }


def main(folder: Path) -> None:
    """What each of the two processes does, all cases one after another: starting takes longest."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in CASES:
        torch.save(observed(case), folder / f"{case}-{rank}.pt")
    (folder / f"trainer-{rank}.json").write_text(json.dumps(trained(folder, 1)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they saw."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    shared = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": shared}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_drop_and_restore_as_one(two: Path, case: Case) -> None:
    """Weights bit for bit; losses and gradients to float32's rounding, as sums run in another order."""
    expected = observed(case)
    assert any(not torch.equal(expected["first"][name], value) for name, value in expected["before"].items())
    assert case.p == 1 or differ(expected["first"], expected["second"])
    for rank in (0, 1):
        found = torch.load(two / f"{case}-{rank}.pt")
        for part in ("before", "first", "second", "after", "state dict", "adapter"):
            assert found[part].keys() == expected[part].keys()
            assert not differ(found[part], expected[part]), part
        assert not differ(found["before"], found["after"])
        assert not differ(found["before"], {name: found["state dict"][name] for name in found["before"]})
        assert found["gradients"].keys() == expected["gradients"].keys()
        for part in ("losses", "gradients"):  # both processes saw the same batch; their mean is what one gives
            for name, value in expected[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-4, atol=1e-6)
                assert value.isfinite().all()


def differ(some: Named, other: Named) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in some.items())


def test_trainer_in_two_processes_trains_as_in_one_with_twice_the_accumulation(two: Path, tmp_path: Path) -> None:
    expected = trained(tmp_path, 2)
    first, second = (json.loads((two / f"trainer-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["same"], first["processes"], first["p"]) == (True, 2, expected["p"])
    torch.testing.assert_close(torch.tensor(first["adapter"]), torch.tensor(expected["adapter"]), rtol=1e-4, atol=1e-6)


# torch warns of FSDP1 on the CPU, and that it is superseded
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp1_is_refused_by_name(tmp_path: Path) -> None:
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
    main(Path(sys.argv[1]))
