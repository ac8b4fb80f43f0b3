"""What a GPU gives is what a CPU gives; skipped where there is none.

In float32, within 1e-4 of the largest value: products are summed in another order, TensorFloat-32 is off.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from losses import encoded, gradients, narrow
from training import digest, with_adapter
from transformers import AutoModelForCausalLM

from mwtool import MacDrop, scan_checkpoint, scan_model
from mwtool.errors import MwtoolError
from mwtool.evaluation.compiled import Compilation
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.windows import Windows
from mwtool.finetune.batch_size import fitted
from mwtool.finetune.config import Recipe
from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.padding_free import chosen, flattened, rows
from mwtool.finetune.sequences import collate
from mwtool.models.load import load
from mwtool.models.source import DEMO
from mwtool.surgery.attack import edited, parse_attack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_a_scan_from_files_gives_the_states_of_a_cpu(tmp_path: Path, model_type: str) -> None:
    folder = str(tiny.saved(tmp_path, tiny.model(model_type)))
    ours, theirs = (scan_checkpoint(folder, device=device) for device in ("cuda", "cpu"))
    assert ours.device.startswith("cuda")
    assert len(ours.states) == len(theirs.states)
    for one, other in zip(ours.states, theirs.states, strict=True):
        assert (one.hidden.cpu() - other.hidden).abs().max() <= 1e-4 * other.hidden.abs().max()


def test_the_bundled_model_has_the_same_rows_from_files_and_in_memory() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO).cuda()
    found = [scan_checkpoint("demo"), scan_checkpoint("demo", device="cuda"), scan_model(model)]
    rows = [(one.massive.layer, one.massive.indices[0], one.massive.dimension) for one in found if one.massive]
    assert rows == rows[:1] * 3


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "mixtral"])
def test_rows_without_padding_give_loss_and_gradients_of_padded_batches(model_type: str) -> None:
    """torch's kernel in bfloat16 against masks: both round to 8 bits, at other places."""
    model = with_adapter(tiny.model(model_type, torch.bfloat16, hidden_size=64, head_dim=16)).cuda()
    data = encoded((90, 50, 120, 30))
    head, examples = TrainedHead(model), [data[at] for at in range(len(data))]
    head.narrow_if_same()
    assert chosen(model, Recipe(dtype="bfloat16")) is flattened
    found = []
    for put in (collate, flattened):
        batch = {name: one.cuda() if torch.is_tensor(one) else one for name, one in put(examples).items()}
        with rows(model, "bfloat16") if put is flattened else nullcontext(), torch.autocast("cuda", torch.bfloat16):
            loss = narrow(model, batch, head)
        found.append((loss.item(), gradients(model, loss)))
    (padded_, theirs), (row, ours) = found
    assert row == pytest.approx(padded_, rel=1e-2)
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    assert apart <= 0.05 * torch.cat([one.flatten() for one in theirs.values()]).norm()


def test_batch_size_and_checkpointing_are_found_by_trials_and_a_lack_of_memory_is_one_line() -> None:
    model, data = with_adapter(tiny.model("llama")).cuda(), encoded((90, 50, 120, 30))
    found = fitted(model, data, Recipe(effective_batch=4, dtype="bfloat16"))
    assert (found.batch_size, found.gradient_checkpointing) == (4, False)
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(MwtoolError, match="not enough memory to train on 1 sequence of 120 tokens at once"):
            fitted(model, data, Recipe(effective_batch=4, dtype="bfloat16"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def cut() -> Windows:
    source = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(3, 60, (length,), generator=source) for length in (24, 24, 17, 24, 9))
    counts = tuple(len(one) - 1 for one in ids)
    return Windows(
        ids=ids,
        scored=counts,
        sample=tuple(range(5)),
        units=counts,
        protocol="sun-4096",
        metric="perplexity",
        length=24,
        bos=None,
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("attack", ["none", "zero:2", "scale:0.5:2"])
def test_perplexity_is_that_of_a_cpu_attacked_or_not(model_type: str, attack: str) -> None:
    model = tiny.model(model_type, num_hidden_layers=2)
    ffn = tiny.layers_of(model)[1].ffns[0]
    values = []
    for device in ("cpu", "cuda"):
        before = digest(model.to(device))
        with edited(model, ffn, (3, 5), parse_attack(attack)):
            values.append(perplexity(model, cut(), batch_size=3).value)
        assert digest(model) == before
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_compiled_perplexity_is_that_of_the_uncompiled_model_attacked_or_not(model_type: str) -> None:
    """With code that inductor generates; within rounding, and closer than what the attack changes."""
    model: Any = tiny.model(model_type, num_hidden_layers=2).cuda()
    compiled = Compilation(model, [model.get_submodule(one.path) for one in tiny.layers_of(model)])
    found: list[float] = []
    for attack in ("none", "zero:2", "retain:2"):
        with edited(model, tiny.layers_of(model)[1].ffns[0], (3, 5), parse_attack(attack)):
            plain, fast = (perplexity(model, cut(), batch_size=3, compiled=one).value for one in (None, compiled))
        assert fast == pytest.approx(plain, rel=1e-4)
        found.append(plain)
    assert max(abs(one / found[0] - 1) for one in found[1:]) > 5e-3


@pytest.mark.parametrize("dora", [False, True])
def test_macdrop_in_bfloat16_puts_back_every_row_bit_for_bit(dora: bool) -> None:  # noqa: FBT001 - a parameter
    base = load("demo", device="cuda", dtype="bfloat16").base
    massive = scan_model(base).massive
    assert massive is not None
    model = with_adapter(base, dora=dora)
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    kept = {name: value.detach().clone() for name, value in frozen.items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    ids = torch.randint(3, 4000, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()
    engine = MacDrop(model, massive, "linear:0.9-0.0", steps=6)
    losses = []
    for step in range(1, 7):
        with engine.step(step):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert all(value.equal(kept[name]) for name, value in frozen.items())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
