"""Perplexity does not depend on how many windows run at once, and a lack of memory makes them fewer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch

from mwtool.errors import MwtoolError
from mwtool.evaluation import batches
from mwtool.evaluation.perplexity import perplexity
from mwtool.evaluation.prefix_reuse import Variant, perplexities
from mwtool.evaluation.windows import Windows
from mwtool.surgery.attack import Attack, Edit, edited_together

DEPTH = 2


def cut(count: int = 7, length: int = 24) -> Windows:
    """Windows of random tokens, the last one shorter."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 60, (length,), generator=generator) for _ in range(count)]
    ids[-1] = ids[-1][: length // 2]
    scored = tuple(len(one) - 1 for one in ids)
    return Windows(
        ids=tuple(ids),
        scored=scored,
        sample=tuple(range(count)),
        units=scored,
        protocol="sun-4096",
        metric="perplexity",
        length=length,
        bos=None,
    )


def with_room_for(tokens: int, model: Any) -> list[int]:
    """Make the model run out of memory beyond so many tokens; returns how many windows it was given each time."""
    given: list[int] = []

    def refuse(_module: Any, args: Any) -> None:
        given.append(len(args[0]))
        if args[0].shape[0] * args[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.layers[1].register_forward_pre_hook(refuse)
    return given


def attacked(model: Any) -> Variant:
    edit = Edit(tiny.layers_of(model)[1].ffns[0], (1, 4))
    return Variant(1, partial(edited_together, model, [edit], Attack("zero", 2)))


def by_one(model: Any, cut: Windows, size: int | None) -> list[tuple[float, ...]]:
    return [perplexity(model, cut, batch_size=size).nll]


def by_both(model: Any, cut: Windows, size: int | None) -> list[tuple[float, ...]]:
    layers = [model.get_submodule(layer.path) for layer in tiny.layers_of(model)]
    return [one.nll for one in perplexities(model, layers, cut, [attacked(model)], batch_size=size)]


@pytest.mark.parametrize(
    ("dtype", "nats"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_the_loss_of_a_window_is_the_same_alone_and_beside_others(
    model_type: str, dtype: torch.dtype, nats: float
) -> None:
    """To rounding: in batches of other sizes sums are made in another order, and norms are in float32 in any case.

    nats: a token, as the documentation states it.
    """
    model, cuts = tiny.model(model_type, dtype, num_hidden_layers=DEPTH), cut()
    alone = perplexity(model, cuts, batch_size=1)
    exact = perplexity(tiny.model(model_type, dtype, num_hidden_layers=DEPTH).double(), cuts, batch_size=1)
    for size in (2, 3, 7, None):
        found = perplexity(model, cuts, batch_size=size)
        for one, other, count in zip(found.nll, alone.nll, cuts.units, strict=True):
            assert abs(one - other) / count <= nats, size
    assert alone.value == pytest.approx(exact.value, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("measured", [by_one, by_both])
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_later_ones_begin_there(
    measured: Callable[..., list[tuple[float, ...]]],
) -> None:
    model = tiny.model("llama", torch.float64, num_hidden_layers=DEPTH)
    whole = measured(model, cut(11), 1)
    given = with_room_for(24, model)
    found = measured(model, cut(11), 5)
    for one, other in zip(found, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert [size for size in given if size > 1] == [5, 3, 2]
    assert given.count(1) >= 11


def test_what_was_run_at_once_in_the_end_is_noted() -> None:
    model = tiny.model("llama", num_hidden_layers=DEPTH)
    with_room_for(48, model)
    assert perplexity(model, cut(), batch_size=7).notes == (
        "not enough memory for larger batches: 2 windows were run at once",
    )
    assert perplexity(model, cut(), batch_size=2).notes == ()


def test_a_window_that_does_not_fit_by_itself_is_said_in_one_line() -> None:
    model = tiny.model("llama", num_hidden_layers=DEPTH)
    with_room_for(23, model)
    with pytest.raises(MwtoolError, match=r"^not enough memory for one window of 24 tokens; give a shorter --window"):
        perplexity(model, cut(), batch_size=2)


def test_a_gpu_with_little_free_memory_is_given_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    width, free = 2048, 48 * 2048 * 2 * 5000  # room for 5,000 tokens
    monkeypatch.setattr(batches, "_free", lambda _device: free)

    class Embedding:
        """As a table on a GPU looks, where there is none."""

        device, shape = torch.device("cuda"), (1, width)

        def element_size(self) -> int:
            return 2

    table: Any = Embedding()
    assert batches.tokens_at_once(table) == 5000
    free *= 10
    assert batches.tokens_at_once(table) == 2**26 // (2 * width)
