"""A sweep that is killed goes on from its file, and ends with the document of one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import Ran, run
from forks import forked
from questions import CHOICES, rows
from words import planted_folder, with_tokenizer

from mwtool.ablation import measuring
from mwtool.evaluation import prefix_reuse, questions
from mwtool.evaluation.prefix_reuse import batches_done

SMALL = ("--window", 16, "--batch-size", 2, "--mode", "zero", "-k", "0,2", "--draws", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = planted_folder(tmp_path_factory.mktemp("model"))
    rows(folder, "mc", CHOICES)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a sweep that nothing stopped."""
    path = tmp_path_factory.mktemp("whole") / "a.json"
    assert ablate(folder, path).code == 0
    return kept(path)


def arguments(folder: Path, output: Path, *more: object) -> list[object]:
    tasks = ("--task", f"ppl:{folder / 'text.txt'}", "--task", f"mc:{folder / 'mc.jsonl'}")
    return ["ablate", folder, *tasks, *SMALL, "-o", output, *more]


def ablate(folder: Path, output: Path, *more: object) -> Ran:
    return run(*arguments(folder, output, *more))


def kept(path: Path) -> dict[str, Any]:
    return {**json.loads(path.read_text()), "command": None}


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    original, calls = getattr(owner, name), []

    def stopping(*found: Any) -> Any:
        calls.append(found)
        if len(calls) > count:
            raise Stopped
        return original(*found)

    patch.setattr(owner, name, stopping)


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_stopped_in_a_perplexity_it_goes_on_after_the_last_batch(
    folder: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Four states a batch: in the first batch, at its end, in the third, at its end."""
    path = tmp_path / "a.json"
    monkeypatch.setattr(measuring, "EVERY", 0.0)
    with monkeypatch.context() as patch:
        stop_at(patch, prefix_reuse, "batch_sums", count)
        with pytest.raises(Stopped):
            ablate(folder, path)
    done = count // 4
    assert path.exists() == (done > 0)
    if done:
        part = kept(path)["part"]
        assert [len(one["sums"]) for one in part["under"]] == [2 * done] * 4
        assert not kept(path)["complete"]
    calls: list[int] = []
    original = prefix_reuse.batch_sums
    monkeypatch.setattr(prefix_reuse, "batch_sums", lambda *found: calls.append(1) or original(*found))
    assert ablate(folder, path, "--resume").code == 0
    assert len(calls) == 4 * (4 - done)
    assert kept(path) == whole


@pytest.mark.parametrize("count", [1, 3])
def test_stopped_between_other_tasks_it_goes_on_with_the_next(
    folder: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Until then the document is that of the tasks that have been measured under all attacks."""
    path = tmp_path / "a.json"
    with monkeypatch.context() as patch:
        stop_at(patch, questions.Questions, "run", count)
        with pytest.raises(Stopped):
            ablate(folder, path)
    found = kept(path)
    tasks = [{metric["task"] for metric in one["metrics"]} for one in found["measured"]]
    assert [len(one) for one in tasks] == [2] * count + [1] * (4 - count)
    assert (found["complete"], [task["task"] for task in found["tasks"]]) == (False, [f"ppl:{folder / 'text.txt'}"])
    assert len(found["runs"]) == len(whole["runs"])
    assert found["verdicts"] == whole["verdicts"]
    calls: list[int] = []
    original = questions.Questions.run
    monkeypatch.setattr(questions.Questions, "run", lambda *found: calls.append(1) or original(*found))
    assert ablate(folder, path, "--resume").code == 0
    assert len(calls) == 4 - count
    assert kept(path) == whole


KILLER = """
import os, signal
from mwtool.ablation import measuring
from mwtool.evaluation import prefix_reuse, questions
measuring.EVERY, calls, original = 0.0, [], prefix_reuse.batch_sums
def killing(*found):
    calls.append(found)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*found)
prefix_reuse.batch_sums = killing
"""


def test_killed_without_warning_it_goes_on(folder: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    status, _, err = forked(*arguments(folder, path), before=KILLER).end()
    assert status == -signal.SIGKILL, err
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert ablate(folder, path, "--resume").code == 0
    assert kept(path) == whole


def test_a_finished_sweep_is_shown_again_and_more_can_be_added(
    folder: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(whole))
    added = ablate(folder, path, "--mode", "retain", "--resume", "--json").document
    assert [run["mode"] for run in added["runs"]] == ["zero"] * 4 + ["retain"] * 4
    assert added["runs"][:4] == whole["runs"]
    fresh = ablate(folder, tmp_path / "b.json", "--mode", "retain", "--json").document
    assert {**added, "command": None} == {**fresh, "command": None}
    for owner, name in ((prefix_reuse, "batch_sums"), (questions.Questions, "run")):
        stop_at(monkeypatch, owner, name, 0)
    assert {**ablate(folder, path, "--mode", "retain", "--resume", "--json").document, "command": None} == {
        **fresh,
        "command": None,
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--limit", 3), "was made with options limit None, now it is limit 3"),
        (("--seed", 1), "was made with seed 0, now it is 1"),
        (("--bos", "7", "--layer", 1, "--indices", "17,1"), "was made with bos id 1"),
        (("-k", "0,1"), "also holds zero:2 on rows "),
        (("--indices", "4,5"), "also holds zero:2 on rows "),
        (("--no-controls",), "which is not asked for now; to resume, give the same --mode, -k and rows"),
        (("--dtype", "bfloat16"), "was made with dtype float32, now it is bfloat16"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_kept(
    folder: Path, whole: dict[str, Any], tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(whole))
    assert message in ablate(folder, path, *more, "--resume").fault
    assert json.loads(path.read_text()) == whole


def test_another_model_another_text_a_task_left_out_and_other_files_are_refused(
    folder: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(whole))
    other = with_tokenizer(tmp_path / "other", tiny.model("llama", seed=1))
    options = ("--layer", 1, "--indices", "1,2", "-o", path, "--resume")
    task = ("--task", f"ppl:{folder / 'text.txt'}")
    fault = run("ablate", other, *task, *SMALL, *options).fault
    assert f"was made with model {folder}, now it is {other}; use the same to resume, or write elsewhere" in fault
    fault = run("ablate", folder, *task, *SMALL, "-o", path, "--resume").fault
    assert f"also holds mc:{folder / 'mc.jsonl'}, which is not asked for now; add it, or write elsewhere" in fault
    changed = json.loads(json.dumps(whole))
    changed["measured"][0]["metrics"][0]["digest"] = "0" * 16
    path.write_text(json.dumps(changed))
    assert "was made with another text of ppl:" in ablate(folder, path, "--resume").fault
    for content, message in (
        ("{}", "has schema None; expected 'mwtool.ablate/1'"),
        (json.dumps({key: value for key, value in whole.items() if key != "measured"}), "measured: field required"),
        ("[", "is not JSON"),
    ):
        path.write_text(content)
        assert message in ablate(folder, path, "--resume").fault
    ran = run("ablate", folder, *task, "--resume")
    assert (ran.code, "--resume continues the file given with -o; add -o FILE" in " ".join(ran.err.split())) == (
        2,
        True,
    )


def test_sums_that_do_not_end_with_a_batch_are_not_used() -> None:
    """As after another batch size; those of whole batches are, whatever their size was."""

    class Some:
        windows = (0, 1)

    parts: Any = [Some, Some, Some]
    assert batches_done(parts, [[0.0] * 4] * 2, 2) == 2
    assert batches_done(parts, [[0.0] * 6] * 2, 2) == 3
    assert batches_done(parts, [[0.0] * 3] * 2, 2) == 0
    assert batches_done(parts, [[0.0] * 4] * 2, 3) == 0
    assert batches_done(parts, [[0.0] * 4, [0.0] * 2], 2) == 0
    assert batches_done(parts, (), 2) == 0
