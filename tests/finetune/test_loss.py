"""The loss of trained tokens: the same number by the narrow head and the whole, in any batches, with any model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from losses import encoded, gradients, narrow, whole
from training import with_adapter

from mwtool.finetune.loss import TrainedHead, trained_head
from mwtool.finetune.padding_free import flattened
from mwtool.finetune.sequences import collate

TYPES = ("llama", "gpt2", "gemma2", "mixtral", "bloom", "phi", "opt", "cohere")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT, of GPT-2's Conv1D
@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)  # PEFT, of Mixtral's experts
@pytest.mark.parametrize("model_type", TYPES)
def test_the_head_at_trained_positions_gives_loss_and_gradients_of_all_logits(model_type: str) -> None:
    model, data = with_adapter(tiny.model(model_type)).eval(), encoded()  # without dropout
    head, batch = TrainedHead(model), collate([data[at] for at in range(len(data))])
    head.narrow_if_same()
    assert head.narrow, model_type
    with head.at(batch["labels"]):
        rows = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits.shape
    assert rows[:2] == (1, data.trained_tokens)
    ours, theirs = narrow(model, batch, head), whole(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    one, other = gradients(model, ours), gradients(model, theirs)
    assert one.keys() == other.keys()
    for name in one:  # float32 sums of other shapes
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_a_model_whose_logits_need_more_than_their_own_position_keeps_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = tiny.model("llama").eval(), encoded()
    forward = type(model).forward

    def centred(self: Any, *args: Any, **options: Any) -> Any:
        found = forward(self, *args, **options)
        found.logits = found.logits - found.logits.mean(1, keepdim=True)
        return found

    monkeypatch.setattr(type(model), "forward", centred)
    head, batch = TrainedHead(model), collate([data[at] for at in range(len(data))])
    head.narrow_if_same()
    assert not head.narrow
    torch.testing.assert_close(narrow(model, batch, head), whole(model, batch), rtol=1e-6, atol=0)


def test_a_mixture_that_adds_a_loss_of_its_router_computes_its_own() -> None:
    model = tiny.model("mixtral")
    assert trained_head(model) is not None
    model.config.output_router_logits = True
    assert trained_head(model) is None


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("padded", [True, False])
def test_losses_and_gradients_of_micro_batches_add_up_to_the_mean_over_tokens(size: int, *, padded: bool) -> None:
    model, data = with_adapter(tiny.model("llama")), encoded((9, 5, 12, 3, 7))
    head, everything = TrainedHead(model), list(range(len(data)))
    head.narrow_if_same()
    put = collate if padded else flattened
    parts = [everything[at : at + size] for at in range(0, len(data), size)]
    losses = [narrow(model, put([data[at] for at in part]), head, data.trained_tokens) for part in parts]
    once = whole(model, collate([data[at] for at in everything]))
    torch.testing.assert_close(sum(losses), once, rtol=1e-5, atol=0)
    one, other = gradients(model, sum(losses)), gradients(model, once)  # type: ignore[arg-type]
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


def test_sums_are_those_of_each_sequence() -> None:
    model, data = tiny.model("llama").eval(), encoded()
    head = TrainedHead(model)
    head.narrow_if_same()
    batch = collate([data[at] for at in range(len(data))])
    labels = batch.pop("labels")
    with torch.no_grad(), head.at(labels):
        sums = head.sums(model(**batch, use_cache=False), labels)
    for at in range(len(data)):
        one = replace(data).only([at])
        alone = whole(model, collate([one[0]])) * one.trained_tokens
        assert sums[at].tolist() == pytest.approx([alone.item(), one.trained_tokens], rel=1e-5)
