"""What is told of training before it begins: a step without numbers against a real one, and what follows for a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import run
from losses import encoded
from training import small
from training import with_adapter as wrapped
from words import planted_folder

from mwtool.finetune.batch_size import recomputing
from mwtool.finetune.config import Recipe
from mwtool.finetune.fake_step import largest_batch, step_peak
from mwtool.finetune.loss import TrainedHead
from mwtool.finetune.sequences import IGNORED
from mwtool.finetune.trial import Trial, step_and_saving
from mwtool.models.load import load
from mwtool.models.peak_memory import LiveTensors

RECIPE = Recipe(rank=4, batch_size=2, effective_batch=4, dtype="float32", gradient_checkpointing=False)
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_without_numbers_takes_what_a_real_one_does(model_type: str, *, recomputed: bool) -> None:
    recipe, data = replace(RECIPE, gradient_checkpointing=recomputed), encoded((40, 33, 51, 20))
    shapes = wrapped(small(model_type, **SHAPE)).to("meta")
    told = step_peak(shapes, data, recipe, steps=2, device="cpu")
    model = wrapped(small(model_type, **SHAPE))
    head, batch = TrainedHead(model), largest_batch(data, recipe, 2)
    labels = batch.pop("labels")
    head.narrow_if_same()
    if recomputed:
        recomputing(model, "enable")({"use_reentrant": False})
    with LiveTensors() as counted:
        for _ in range(2):
            with head.at(labels):
                head.token_mean(model(**batch), labels).backward()
    assert told == pytest.approx(counted.most, rel=0.05)  # 21 kB apart where activations are recomputed


def test_the_largest_batch_has_the_most_tokens_and_the_most_trained_ones_that_are_drawn() -> None:
    data = encoded((9, 5, 12, 3), prompt=2)
    every = largest_batch(data, replace(RECIPE, batch_size=4), 1)
    assert every["input_ids"].shape == (4, 12)
    assert int((every["labels"] != IGNORED).sum()) == 7 + 3 + 10 + 1
    one = largest_batch(data, replace(RECIPE, batch_size=1), 1)
    assert one["input_ids"].shape == (1, 12)
    assert int((one["labels"] != IGNORED).sum()) == 10


def test_the_time_of_a_run_is_that_of_its_steps_checkpoints_and_evaluations() -> None:
    trial = Trial(
        recipe=RECIPE, besides=10.0, step=2.0, saving=0.5, evaluation=3.0, process=None, gpu=None, took=1.0
    )  # fmt: skip
    assert trial.total(40, 15) == 10 + 40 * 2 + 19 * 0.5 + (1 + 2) * 3  # a checkpoint every second step
    assert replace(trial, evaluation=0.0).total(3, 15) == 10 + 3 * 2 + 2 * 0.5


def test_a_step_and_a_checkpoint_are_told_apart_by_where_checkpoints_are_saved() -> None:
    assert step_and_saving([10.0, 12.0, 15.0, 17.2], [9.0, 2.0, 2.0, 2.0]) == pytest.approx((2.1, 0.9))
    assert step_and_saving([10.0], [9.0]) == (9.0, 0.0)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "model", tie_word_embeddings=True)
    given = ("finetune", folder, "--data", folder / "text.txt", "--max-length", 16, "--batch-size", 2)
    plan = run(*given, "--effective-batch", 2, "--dry-run", "--json").document
    assert plan["parameters"] == load(str(folder)).model.num_parameters()


def test_a_dry_run_tells_no_time_unless_it_tries_and_a_trial_leaves_nothing(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "model")
    given = ("finetune", folder, "--data", folder / "text.txt", "--max-length", 16, "--batch-size", 2)
    before = sorted(tmp_path.rglob("*"))
    plan = run(*given, "--effective-batch", 2, "--dry-run", "--json").document
    tried = run(*given, "--effective-batch", 2, "--dry-run", "--trial", "--json").document
    assert (plan["total_seconds"], plan["memory"]["activations"] > 0, plan["memory"]["process"] > 10**8) == (None, 1, 1)
    assert tried["total_seconds"] > tried["steps"] * tried["step_seconds"] > 0
    assert tried["memory"]["activations"] == plan["memory"]["activations"]
    assert sorted(tmp_path.rglob("*")) == before
    assert run(*given, "-o", tmp_path / "out", "--trial").code == 2
