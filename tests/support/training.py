"""What tests of training share: tiny models with an adapter, rows called massive, hashes, a batch."""

from __future__ import annotations

import hashlib
from operator import itemgetter
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mwtool.massive import MassiveWeights

IDS = torch.tensor([[tiny.BOS, 5, 9, 3, 17, 22, 40, 8], [tiny.BOS, 30, 2, 11, 7, 7, 19, 4]])
ROWS = (7, 3, 12, 8, 1)


def small(model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return tiny.model(model_type, dtype, num_hidden_layers=3, **changes)


def frozen(model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Without an adapter; nothing in it is trained."""
    model = small(model_type, dtype, **changes)
    model.requires_grad_(requires_grad=False)
    return model


def massive(model: PreTrainedModel, layer: int = 1, expert: int | None = None) -> MassiveWeights:
    """Rows as a scan would give them; random models have none of their own."""
    ffn = next(one for one in tiny.layers_of(model)[layer].ffns if one.expert == expert)
    some = (1.0,) * len(ROWS)
    return MassiveWeights(
        layer=layer,
        module=ffn.module,
        expert=expert,
        indices=ROWS,
        magnitudes=some,
        shares=some,
        median=0.1,
        count=1,
        share_of_parameters=0.001,
        dimension=5,
        value=200.0,
    )


def with_adapter(model: PreTrainedModel, *, dora: bool = False, trained: bool = True, **options: Any) -> PeftModel:
    """LoRA or DoRA; `trained` gives B values, which begins at zero."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **options}
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(use_dora=dora, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and trained:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.train()


def digest(model: nn.Module) -> str:
    """Of every pre-trained weight, name and bytes."""
    state = hashlib.sha256()
    named = sorted(model.named_parameters(), key=itemgetter(0))  # a forward of PEFT's experts changes their order
    for name, tensor in named:
        if "lora_" not in name:
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def loss_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what is trained, after one backward."""
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
