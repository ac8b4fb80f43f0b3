"""Trial steps: what they find, what they leave behind, and how they end where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from losses import encoded
from training import with_adapter

from mwtool.errors import BadValue, MwtoolError
from mwtool.finetune import batch_size
from mwtool.finetune.batch_size import fitted, sizes, tried, without_trial
from mwtool.finetune.config import Recipe
from mwtool.finetune.sequences import collate


def fits_at_most(most: int, with_checkpointing: int, seen: list[tuple[int, bool]]) -> Any:
    def fits(size: int, *, checkpointing: bool) -> None:
        seen.append((size, checkpointing))
        if size > (with_checkpointing if checkpointing else most):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    return fits


@pytest.mark.parametrize(
    ("most", "with_checkpointing", "found"),
    [(99, 99, (32, False)), (31, 99, (16, False)), (1, 99, (1, False)), (0, 99, (32, True)), (0, 5, (4, True))],
)
def test_the_largest_batch_that_fits_is_found_and_checkpointing_only_where_nothing_fits_without(
    most: int, with_checkpointing: int, found: tuple[int, bool]
) -> None:
    recipe, seen = Recipe(effective_batch=32), list[tuple[int, bool]]()
    assert tried(recipe, sizes(recipe, 500), fits_at_most(most, with_checkpointing, seen), longest=9) == found
    assert seen[-1] == found


def test_what_the_recipe_sets_is_not_varied() -> None:
    seen: list[tuple[int, bool]] = []
    assert tried(Recipe(batch_size=4), (8, 4, 2, 1), fits_at_most(2, 8, seen), longest=9) == (4, True)
    assert seen == [(4, False), (4, True)]
    kept = Recipe(gradient_checkpointing=False)
    assert tried(kept, (8, 4, 2, 1), fits_at_most(2, 8, []), longest=9) == (2, False)


def test_a_trial_that_never_fits_ends_in_one_line_that_says_what_to_do() -> None:
    message = (
        r"not enough memory to train on 1 sequence of 777 tokens at once: lower --max-length, or add --quantize 4bit$"
    )
    with pytest.raises(MwtoolError, match=message):
        tried(Recipe(), (2, 1), fits_at_most(0, 0, []), longest=777)
    with pytest.raises(MwtoolError, match="or add --gradient-checkpointing or --quantize 4bit"):
        tried(Recipe(gradient_checkpointing=False), (2, 1), fits_at_most(0, 0, []), longest=777)


def test_other_errors_of_a_trial_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(_size: int, *, checkpointing: bool) -> None:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied {checkpointing}")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tried(Recipe(), (2, 1), broken, longest=9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trial_leaves_weights_gradients_mode_and_random_numbers_as_they_were(*, checkpointing: bool) -> None:
    model, data = with_adapter(tiny.model("llama"), lora_dropout=0.5), encoded()
    model.eval()
    torch.manual_seed(3)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, torch.rand(3)
    torch.manual_seed(3)
    batch = collate([data[at] for at in range(len(data))])
    batch_size._trial(model, batch, Recipe(), checkpointing=checkpointing)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert not model.training
    assert not model.get_base_model().is_gradient_checkpointing


def test_on_a_cpu_there_is_no_trial_and_at_most_8_sequences_run_at_once() -> None:
    model, data = with_adapter(tiny.model("llama")), encoded()
    found = fitted(model, data, Recipe(effective_batch=6))
    assert (found.batch_size, found.gradient_checkpointing, found.padding_free) == (3, False, False)
    assert without_trial(Recipe(effective_batch=256), 500, processes=2).batch_size == 8
    assert without_trial(Recipe(effective_batch=30), 500, processes=2).batch_size == 5


def test_sizes_divide_the_effective_batch_and_steps_do_not_depend_on_them() -> None:
    recipe = Recipe(effective_batch=24)
    assert sizes(recipe, 500) == (24, 12, 8, 6, 4, 3, 2, 1)
    assert sizes(recipe, 7, processes=2) == (6, 4, 3, 2, 1)
    steps = {Recipe(effective_batch=24, batch_size=size).steps(101, 2) for size in (1, 2, 3, 4, 6, 12)}
    assert steps == {recipe.steps(101, 2)}
    with pytest.raises(BadValue, match="no multiple of 1 sequences on 5 devices"):
        recipe.accumulation(5)


def test_a_resumed_run_takes_what_the_first_one_found() -> None:
    first = {"batch_size": 16, "gradient_checkpointing": True, "padding_free": False, "lr": 3.0}
    found = Recipe().with_found(first)
    assert (found.batch_size, found.gradient_checkpointing, found.padding_free, found.lr) == (16, True, False, 1e-4)
    assert Recipe(batch_size=4).with_found(first).batch_size == 4
    assert Recipe().with_found({}) == Recipe()
