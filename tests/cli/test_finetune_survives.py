"""`mwtool finetune` killed, locked out, short of disk, and resumed on another day."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from command import run
from filelock import FileLock
from finetuning import arguments, finetune, weights
from forks import forked
from words import WORDS, planted_folder

from mwtool.finetune import template
from mwtool.finetune.checkpointing import LOCK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


def record(run_folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_folder / "macdrop.json").read_text())
    return document


@pytest.mark.parametrize(("macdrop", "steps"), [("step:0.8", 3), ("step:0.8", 4), ("none", 3)])
def test_a_run_killed_between_its_last_checkpoint_and_its_record_is_finished(
    folder: Path, tmp_path: Path, macdrop: str, steps: int
) -> None:
    """Inside an epoch of two steps (3), and at the end of one (4)."""
    options = ("-o", tmp_path / "out", "--max-steps", steps, "--macdrop", macdrop, "--logging-steps", 1)
    assert finetune(folder, *options).code == 0
    before, document = weights(tmp_path / "out"), record(tmp_path / "out")
    for name in ("macdrop.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / "out" / name).unlink()
    ran = finetune(folder, *options, "--resume")
    assert ran.code == 0, ran
    assert weights(tmp_path / "out") == before
    after = record(tmp_path / "out")
    for key in ("p", "log", "steps", "how", "rows", "notes", "data"):
        assert after[key] == document[key]
    assert max(entry["step"] for entry in after["log"]) == steps


KILLER = """
import os, signal
import mwtool.finetune.trainer as trainer
from transformers import TrainerCallback

class Killer(TrainerCallback):
    def {moment}(self, args, state, control, **rest):
        if state.global_step >= {step}:
            os.kill(os.getpid(), signal.SIGKILL)

made = trainer._trainer
def with_killer(*args, **options):
    found = made(*args, **options)
    found.add_callback(Killer())
    return found
trainer._trainer = with_killer
"""
MOMENTS = (
    "on_step_begin:0 on_substep_end:1 on_pre_optimizer_step:1 on_optimizer_step:2 on_log:2 on_evaluate:2 on_step_end:3 "
    "on_save:3 on_step_begin:4 on_substep_end:4 on_save:6 on_train_begin:6"
)


@pytest.mark.parametrize(
    ("options", "moments"),
    [
        (("--peft", "dora"), MOMENTS),
        # without MacDrop there are fewer callbacks, and a run whose last step is saved ends before training begins
        (("--macdrop", "none"), "on_substep_end:1 on_save:3 on_step_begin:4 on_save:6"),
    ],
    ids=["dora", "none"],
)
def test_a_run_killed_at_every_moment_of_its_steps_ends_as_the_undisturbed_one(
    folder: Path, tmp_path: Path, options: tuple[str, str], moments: str
) -> None:
    """One run of six steps, resumed after each kill; the adapter is equal bit for bit, and so is the log."""
    options = (*options, "--save-steps", "1", "--logging-steps", "1")
    assert finetune(folder, "-o", tmp_path / "whole", *options).code == 0
    command = [*arguments(folder, "-o", tmp_path / "cut", *options), "--resume"]
    for kill in moments.split():
        moment, _, step = kill.partition(":")
        status, _, err = forked(*command, before=KILLER.format(moment=moment, step=step)).end()
        assert status == -signal.SIGKILL, f"{kill}: {err}"
    assert not (tmp_path / "cut" / "macdrop.json").exists()
    assert run(*command).code == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    whole, cut = record(tmp_path / "whole"), record(tmp_path / "cut")
    assert whole["p"] == cut["p"]
    assert whole["log"] == cut["log"]


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for more in ([], ["--resume"]):
        with FileLock(tmp_path / "out" / LOCK):
            fault = finetune(folder, "-o", tmp_path / "out", *more).fault
        assert f"{tmp_path / 'out'} is being written by another run; wait until that ends, or train into" in fault
    assert {one.name for one in (tmp_path / "out").iterdir()} <= {LOCK}
    assert (
        finetune(folder, "-o", tmp_path / "out", "--max-steps", 1).code == 0
    )  # a lock that nobody holds is no obstacle
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_run_that_is_refused_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    assert finetune(folder, "-o", tmp_path / "out", "--data", tmp_path / "absent.jsonl").code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_every_file_of_a_run_has_the_permissions_that_the_umask_leaves(folder: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert finetune(folder, "-o", tmp_path / "out", "--max-steps", 1, "--merge").code == 0
    finally:
        os.umask(before)
    paths = list((tmp_path / "out").rglob("*"))
    assert {"adapter_model.safetensors", "model.safetensors", "optimizer.pt"} <= {path.name for path in paths}
    wrong = [path.name for path in paths if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~mask]
    assert wrong == []


def test_a_disk_that_is_full_at_any_file_is_one_line(folder: Path, tmp_path: Path) -> None:
    """By the largest size a file may have: each lets one more of the files of a checkpoint be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, size in enumerate((0, 500, 3_000, 8_000, 13_000, 15_000, 20_000, 30_000, 45_000, 60_000, 80_000)):
        options = ("-o", tmp_path / str(number), "--max-steps", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            ran = finetune(folder, *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if ran.code:
            assert re.match(r"[^\n]+\n\Z", "\n".join(line for line in ran.err.splitlines() if "error: " in line) + "\n")
            assert "cannot be written: " in ran.err
            assert "Traceback" not in ran.err


def test_a_template_that_writes_the_date_writes_that_of_the_run_when_it_is_resumed_on_another_day(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('w%d') }} {% for m in messages %}{{ m.content }} {% endfor %}</s>"
    )
    rows = [{"instruction": WORDS[n], "output": WORDS[-n]} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("-o", tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--chat-template", tmp_path / "dated.jinja")
    options = (*options, "--max-steps", 2, "--train-on-prompt", "--allow-none")

    def on(day: int) -> None:
        monkeypatch.setattr(template, "today", lambda: datetime(2026, 3, day))  # noqa: DTZ001 # a day, wherever

    on(14)
    assert finetune(folder, *options).code == 0
    first = record(tmp_path / "out")
    (tmp_path / "out" / "macdrop.json").unlink()
    on(15)
    ran = finetune(folder, *options, "--resume")
    assert ran.code == 0, ran
    assert first["data"]["date"] == record(tmp_path / "out")["data"]["date"] == "2026-03-14"
    assert record(tmp_path / "out")["data"]["digest"] == first["data"]["digest"]
    assert finetune(folder, "--dry-run", "--json", *options[2:]).document["data"]["digest"] != first["data"]["digest"]


@pytest.mark.parametrize("packing", [[], ["--packing"]])
def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batch_size(
    folder: Path, tmp_path: Path, packing: list[str]
) -> None:
    rows = [{"instruction": "w1", "output": " ".join(WORDS[: 1 + 5 * (n % 3)])} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--data", tmp_path / "rows.jsonl", "--max-length", 40, "--eval-share", 0.5, "--max-steps", 1)
    options = (*options, "--macdrop", "none", *packing)
    losses = []
    for size in (1, 2, 3, 4, 8):
        effective, out = 9 if size == 3 else 8, tmp_path / f"out{size}"
        assert finetune(folder, *options, "--effective-batch", effective, "--batch-size", size, "-o", out).code == 0
        losses.append(record(out)["measured"]["first_eval_loss"])
    # sums of other parts: float32 forwards of padded batches differ in the last bits
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)
