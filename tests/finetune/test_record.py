"""What a run leaves for later: its record, the marks of its checkpoints, and the lock of its folder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetuning import finetune
from transformers import Trainer
from words import planted_folder

from mwtool.errors import BadValue, OutputError
from mwtool.finetune.checkpointing import LOCK, locked, mark, newest
from mwtool.finetune.document import read_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("key", ["grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_figure_that_is_not_finite_is_null_in_the_record_with_a_note(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: float
) -> None:
    log = Trainer.log

    def broken(self: Trainer, logs: dict[str, Any], *more: Any) -> None:
        if self.state.global_step == 2 and key in logs:
            logs[key] = value
        log(self, logs, *more)

    monkeypatch.setattr(Trainer, "log", broken)
    options = ("--max-steps", 3, "--logging-steps", 1, "--eval-share", 0.2, "--epochs", 3)
    ran = finetune(folder, "-o", tmp_path / "out", *options, "--json")
    assert ran.code == 0, ran.err
    document = read_record(tmp_path / "out" / "macdrop.json")
    assert document == ran.document
    assert [entry["step"] for entry in document["log"] if entry.get(key, 0) is None] == [2]
    assert document["notes"][-1] == f"{key} was not finite at 1 logged step, 2: null in the log"


def test_a_record_that_is_damaged_does_not_pass_for_a_finished_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finetune(folder, "-o", out, "--max-steps", 1).code == 0
    path = out / "macdrop.json"
    for damage, words in (
        (lambda text: text[:100], "is not JSON"),
        (
            lambda text: text.replace('"steps": 1', '"steps": true'),
            "steps: input should be a valid integer, found True",
        ),
        (lambda text: text.replace("finetune/1", "finetune/7"), "has schema 'mwtool.finetune/7'; expected"),
    ):
        whole = path.read_text()
        path.write_text(damage(whole))
        fault = finetune(folder, "-o", out, "--max-steps", 1, "--resume").fault
        assert words in fault
        assert "remove it, and --resume finishes the run once more" in fault
        path.write_text(whole)
    path.unlink()
    assert finetune(folder, "-o", out, "--max-steps", 1, "--resume").code == 0
    assert path.exists()


def test_a_checkpoint_with_a_changed_file_of_the_same_size_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """As a power cut leaves it: there in its full length, but zeros."""
    out, options = tmp_path / "out", ("--max-steps", 3, "--save-steps", 1, "--resume")
    assert finetune(folder, "-o", out, *options).code == 0
    whole = (out / "adapter_model.safetensors").read_bytes()
    (out / "macdrop.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    state = out / "checkpoint-3" / "trainer_state.json"
    state.write_bytes(b"\0" * state.stat().st_size)
    ran = finetune(folder, "-o", out, *options)
    assert ran.code == 0, ran.err
    assert f"{out / 'checkpoint-3'} is incomplete or damaged and is not used" in ran.err
    assert f"resuming from {out / 'checkpoint-2'}" in ran.err
    assert (out / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "mwtool.checkpoint/9"},
        {"history": {"1": 2.0}},
        {"history": {"2": 0.5}},
        {"history": {"x": 0.5}},
        {"history": None},
        {"files": {}},
        {"files": {"../../a.bin": {"size": 8, "sha256": "0" * 64}}},
        {"files": {"a.bin": 8}},
        {"settings": []},
    ],
)
def test_a_mark_that_does_not_hold_what_it_must_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "a.bin").write_bytes(b"12345678")
    mark(checkpoint, {"lr": 0.1}, {1: 0.8})
    assert newest(tmp_path, {"lr": 0.1})[0] is not None
    path = checkpoint / "mwtool_checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    found, notes = newest(tmp_path, {"lr": 0.1})
    assert found is None
    assert "is incomplete or damaged" in notes[0]


CONTENDER = """
import os, sys
from pathlib import Path
from mwtool.errors import OutputError
from mwtool.finetune.checkpointing import locked
run, count, inside = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[1] + ".inside")
taken = 0
while taken < count:
    try:
        with locked(run):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if the other is inside as well
            inside.unlink()
            taken += 1
    except OutputError as fault:
        if "is being written by another run" not in str(fault):
            raise
"""


def test_two_processes_that_take_and_leave_a_folder_are_never_inside_together_and_fail_for_no_other_reason(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / "run"), "1000"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_folder_goes_with_the_run_and_a_path_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).stat().st_mode & 0o111 == 0
        with pytest.raises(OutputError, match="is being written by another run"), locked(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent" / "folder")
    for path, words in (
        (tmp_path / "absent" / "run", "absent does not exist; create it"),
        (tmp_path / "file", "cannot be written: Not a directory"),
        (tmp_path / "nowhere", "cannot be written: File exists"),
    ):
        with pytest.raises((OutputError, BadValue), match=words), locked(path):
            pass
