"""The mean accuracy over tasks: its standard error, its paired change, and where it is shown."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from questions import CHOICES, CLOZE, OPTIONS, rows
from words import planted_folder

from mwtool.evaluation.measurement import Measured, mean_of
from mwtool.evaluation.task_mean import TaskMean, task_means


def answers(task: str, values: list[float], metric: str = "acc", digest: str = "d") -> Measured:
    return Measured(task=task, seconds=0.0, digest=digest, **mean_of(metric, values))


def test_value_and_error_are_those_of_tasks_weighed_alike() -> None:
    """Worked out by hand: accuracies 0.75 of 4 and 0.2 of 5."""
    (mean,) = task_means([answers("a", [1, 1, 1, 0]), answers("b", [0, 0, 1, 0, 0])])
    assert mean.value == pytest.approx((0.75 + 0.2) / 2)
    errors = (math.sqrt(0.25 / 4), math.sqrt(0.2 / 5))
    assert mean.stderr == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert mean.tasks == ("a", "b")


def test_the_paired_interval_holds_the_true_change_in_95_of_100_cases() -> None:
    """Three tasks of 60, 200 and 40 questions, mostly answered alike: 1,000 draws, so +-2 points at 3 sigma."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        pairs = []
        for task, n in (("a", 60), ("b", 200), ("c", 40)):
            plain = (torch.rand(n, generator=generator) < 0.6).double()
            changed = torch.rand(n, generator=generator) < 0.3
            attacked = torch.where(changed, (torch.rand(n, generator=generator) < 0.4).double(), plain)
            pairs.append((answers(task, attacked.tolist()), answers(task, plain.tolist())))
        one, other = (TaskMean("acc", tuple(pair[side] for pair in pairs)) for side in (0, 1))
        change = one.beside(other)
        assert change is not None
        assert change.low is not None
        assert change.high is not None
        assert change.value == pytest.approx(100 * (one.value - other.value))
        held += change.low <= 100 * 0.3 * (0.4 - 0.6) <= change.high
    assert 0.93 < held / 1000 < 0.98


def test_only_accuracies_that_all_tasks_have_are_averaged() -> None:
    perplexity = Measured(
        task="p", metric="acc", value=3.0, stderr=None, n=1, seconds=0.0, samples=(1.0,), weights=(1.0,)
    )
    part = Measured(task="a", metric="acc", part="sub", value=1.0, stderr=None, n=1, seconds=0.0, samples=(1.0,))
    broken = Measured(
        task="z", metric="acc", value=math.nan, stderr=None, n=1, seconds=0.0, samples=(1.0,), nonfinite="x"
    )
    both = [answers("a", [1, 0]), answers("a", [1, 1], "acc_norm"), answers("b", [0, 0])]
    assert [(one.metric, one.tasks) for one in task_means([*both, perplexity, part, broken])] == [("acc", ("a", "b"))]
    assert [one.metric for one in task_means([*both, answers("b", [1, 1], "acc_norm")])] == ["acc", "acc_norm"]
    assert task_means([answers("a", [1, 0])]) == ()
    assert task_means([answers("a", [0.5, 0.2]), answers("b", [0.1, 1.0])]) == ()


def test_other_tasks_or_questions_are_not_compared_and_few_give_no_interval() -> None:
    one = TaskMean("acc", (answers("a", [1, 0, 1, 1]), answers("b", [0, 0, 1, 0])))
    assert one.beside(TaskMean("acc", (answers("a", [1, 0, 1, 1]),))) is None
    other = TaskMean("acc", (answers("a", [1, 0, 1, 1]), answers("b", [0, 0, 1, 0], digest="other")))
    assert one.beside(other) is None
    few = TaskMean("acc", (answers("a", [1, 0]), answers("b", [0, 0, 1, 0])))
    change = few.beside(few)
    assert change is not None
    assert (change.value, change.low) == (0.0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = planted_folder(tmp_path_factory.mktemp("model"))
    for kind, found in (("mc", CHOICES + OPTIONS), ("cloze", CLOZE)):
        rows(folder, kind, found)
    return folder


def tasks(folder: Path) -> tuple[object, ...]:
    return ("--task", f"mc:{folder / 'mc.jsonl'}", "--task", f"cloze:{folder / 'cloze.jsonl'}")


def test_eval_shows_and_records_the_mean_of_each_attack(folder: Path, tmp_path: Path) -> None:
    options = (*tasks(folder), "--attack", "none", "--attack", "zero:2")
    document = run("eval", folder, *options, "--json", "-o", tmp_path / "a.json").document
    values: dict[str, list[float]] = {}
    for result in document["results"]:
        if result["metric"] == "acc":
            values.setdefault(result["attack"], []).append(result["value"])
    assert [(one["attack"], one["metric"], one["value"]) for one in document["means"]] == [
        (attack, "acc", pytest.approx(statistics.fmean(found))) for attack, found in values.items()
    ]
    plain, attacked = document["means"]
    assert (plain["points"], plain["points_interval"]) == (None, None)
    assert attacked["points"] == pytest.approx(100 * (attacked["value"] - plain["value"]))
    shown = run("eval", folder, *options).out
    assert f"{100 * plain['value']:.1f}" in next(line for line in shown.splitlines() if "mean of 2 tasks" in line)
    (tmp_path / "other").mkdir()
    shutil.copyfile(tmp_path / "a.json", tmp_path / "other" / "a.json")  # shown under the same name
    beside = run("eval", "--compare", tmp_path / "a.json", tmp_path / "other" / "a.json", "--json").document
    assert [(one["model"], one["attack"], one["points"]) for one in beside["means"]][2] == ("a", "none", 0.0)


def test_ablate_has_the_mean_of_every_run_beside_the_unchanged_model(folder: Path) -> None:
    options = (*tasks(folder), "--mode", "zero", "-k", "0,2", "--draws", 2)
    document: dict[str, Any] = run("ablate", folder, *options, "--json").document
    names = [task["name"] for task in document["tasks"] if task["metric"] == "acc"]
    plain, *means = document["means"]
    assert plain["value"] == pytest.approx(statistics.fmean(document["baseline"][name] for name in names))
    assert [(one["k"], one["control"]) for one in means] == [(one["k"], one["control"]) for one in document["runs"]]
    for mean, one in zip(means, document["runs"], strict=True):
        assert mean["value"] == pytest.approx(statistics.fmean(one["results"][name] for name in names))
        assert mean["points"] == pytest.approx(statistics.fmean(one["delta"][name] for name in names))
    assert "the mean of 2 tasks, in percent" in run("ablate", folder, *options).out


def test_results_of_before_there_were_means_are_read(folder: Path, tmp_path: Path) -> None:
    document = run("eval", folder, *tasks(folder), "--json").document
    del document["means"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert run("eval", "--compare", tmp_path / "old.json", "--json").document["means"][0]["metric"] == "acc"
