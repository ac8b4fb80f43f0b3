"""Rows without padding: every example gives what it gives alone, or the model is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from losses import encoded, gradients, narrow
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from training import with_adapter

from mwtool.errors import UnsupportedModel
from mwtool.finetune import padding_free
from mwtool.finetune.config import Recipe
from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.padding_free import VARLEN, chosen, flattened, padded, rows
from mwtool.finetune.sequences import Encoded, collate

SET = Recipe(padding_free=True)
LEAKING = {"bloom", "opt"}
"""Types that number positions themselves, or add a bias by distance: no mask can be told from position ids."""


def on_cpu(*given: Tensor, scale: float | None, window_size: tuple[int, int], **_options: Any) -> Tensor:
    """What torch's kernel computes, (N, heads, D), a sequence at a time."""
    query, key, value, starts = (*given[:3], given[3].tolist())
    assert window_size == (-1, 0)
    parts = [
        scaled_dot_product_attention(
            *(one[start:end].transpose(0, 1)[None] for one in (query, key, value)), is_causal=True, scale=scale
        )[0].transpose(0, 1)
        for start, end in pairwise(starts)
    ]
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel needs a GPU: the same by other means, so that all around it runs as it does there."""
    monkeypatch.setattr(padding_free, "_kernel", lambda: on_cpu)
    monkeypatch.setattr(padding_free, "_has_kernel", lambda _model, _dtype: True)


@pytest.mark.filterwarnings("ignore:.*attention_mask:UserWarning")
@pytest.mark.parametrize("model_type", tiny.DENSE_TYPES)
def test_each_example_in_a_row_gives_the_logits_it_gives_alone_or_the_model_is_refused(model_type: str) -> None:
    model, data = tiny.model(model_type).eval(), encoded((9, 5, 12, 3))
    try:
        assert chosen(model, SET) is flattened
    except UnsupportedModel as fault:
        assert "lets examples in a row see each other; leave out --padding-free" in str(fault)  # noqa: PT017 # one of two
        return
    assert model_type not in LEAKING
    row = flattened([data[at] for at in range(len(data))])
    del row["labels"]
    with torch.no_grad():
        together = model(**row, use_cache=False).logits[0].split([len(ids) for ids in data.ids])
        for ids, logits in zip(data.ids, together, strict=True):
            alone = model(input_ids=ids.long()[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(LEAKING))
def test_models_that_leak_are_refused_and_keep_padding_where_nothing_is_said(model_type: str) -> None:
    model = tiny.model(model_type).eval()
    with pytest.raises(UnsupportedModel, match=f"^{model_type} lets examples in a row see each other"):
        chosen(model, SET)
    assert chosen(model, replace(SET, padding_free=None)) is collate


def test_without_the_kernel_padding_stays_unless_it_is_asked_away() -> None:
    model = tiny.model("llama").eval()
    assert chosen(model, Recipe()) is collate
    assert chosen(model, replace(SET, padding_free=False)) is collate
    assert chosen(model, SET) is flattened


@pytest.mark.usefixtures("kernel")
def test_rows_by_the_kernel_give_loss_and_gradients_of_padded_batches() -> None:
    model, data = with_adapter(tiny.model("llama")), encoded((9, 5, 12, 3))
    head, examples = TrainedHead(model), [data[at] for at in range(len(data))]
    head.narrow_if_same()
    assert chosen(model, Recipe()) is flattened
    assert model.config._attn_implementation == "sdpa"
    theirs = narrow(model, collate(examples), head)
    other = gradients(model, theirs)
    with rows(model, "bfloat16"):
        assert model.config._attn_implementation == VARLEN
        ours = narrow(model, flattened(examples), head)
        one = gradients(model, ours)
        with padded(model):  # held-out examples: position ids of packed ones need a mask there
            assert model.config._attn_implementation == "sdpa"
        again = narrow(model, collate(examples), head)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=0)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("kernel")
def test_a_kernel_that_lets_examples_see_each_other_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(*given: Tensor, **options: Any) -> Tensor:
        whole = torch.tensor([0, len(given[0])])
        return on_cpu(*given[:3], whole, **options)

    monkeypatch.setattr(padding_free, "_kernel", lambda: leaking)
    assert chosen(tiny.model("llama").eval(), Recipe()) is collate


def test_packed_sequences_are_taken_apart() -> None:
    apart = encoded((4, 3, 5))
    packed = Encoded(
        ids=(torch.cat(apart.ids[:2]), apart.ids[2]),
        labels=(torch.cat(apart.labels[:2]), apart.labels[2]),
        lengths=((4, 3), (5,)),
    )
    row = flattened([packed[0], packed[1]])
    assert row["cu_seq_lens_q"].tolist() == [0, 4, 7, 12]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]
    assert torch.equal(row["input_ids"][0], torch.cat(apart.ids).long())
    assert torch.equal(row["labels"][0], torch.cat(apart.labels).long())
