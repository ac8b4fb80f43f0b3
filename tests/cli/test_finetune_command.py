"""`mwtool finetune` as a user meets it: what it leaves, says and refuses; killed, stopped and gone on with."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import run, run_apart
from finetuning import arguments, finetune, weights
from forks import forked
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from words import planted_folder

from mwtool.files.document import text_of
from mwtool.finetune.document import model_card
from mwtool.scan.document import scan_document
from mwtool.scan.scanner import scan_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


def test_a_run_leaves_adapter_record_card_and_figure(folder: Path, tmp_path: Path) -> None:
    ran = finetune(folder, "-o", tmp_path / "out", "--macdrop", "linear:0.9-0.1", "--json", "--merge")
    assert ran.code == 0
    document = ran.document
    assert document == json.loads((tmp_path / "out" / "macdrop.json").read_text())
    assert (document["schema"], document["how"], document["rows"][0]) == ("mwtool.finetune/1", "weights", 17)
    assert document["p"] == pytest.approx([0.9, 0.74, 0.58, 0.42, 0.26, 0.1])
    assert [entry["macdrop_p"] for entry in document["log"] if "loss" in entry] == pytest.approx(document["p"])
    assert document["data"]["sequences"] + document["data"]["held_out"] == 7
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "pipeline_tag: text-generation",
        f'base = "path/to/{folder.name}"',
        *(f"- {note}" for note in document["notes"]),
        "tags: [lora, macdrop]",
        "linear:0.9-0.1",
        "| lr | 0.01 |",
        "| rank | 4 |",
        "held-out loss",
    ):
        assert said in card
    assert f"{document['measured']['last_eval_loss']:.4f}" in card
    assert str(folder.parent) not in card  # it is published with the adapter; the Hub takes no path as a base model
    assert "base_model:" not in card
    public = model_card({**document, "model": "owner/name"}, "owner/name")
    assert "\nbase_model: owner/name\n" in public
    assert 'AutoTokenizer.from_pretrained("owner/name")' in public
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    names = {one.name for one in (tmp_path / "out").iterdir() if not one.name.startswith("checkpoint-")}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "macdrop.json", "merged", "training.png"
    }  # fmt: skip
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].r == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")


def test_progress_has_loss_p_step_time_and_time_left_and_stdout_the_outcome(folder: Path, tmp_path: Path) -> None:
    ran = finetune(folder, "-o", tmp_path / "out", "--max-steps", 2)
    lines = [line for line in ran.err.splitlines() if line.startswith("step ")]
    shape = r"step \d of 2, loss \d\.\d{4}, p 0\.\d{3}, [\d.e-]+ s a step, \d+ s left"
    assert len(lines) == 2
    assert all(re.fullmatch(shape, line) for line in lines), lines
    assert "2 steps; the adapter is in" in ran.out


def test_the_plan_is_shown_before_training_and_the_command_that_measures_the_result_at_the_end(
    folder: Path, tmp_path: Path
) -> None:
    ran = finetune(folder, "-o", tmp_path / "out", "--epochs", 1, "--batch-size", "auto")
    said = ran.err.splitlines()
    begins = next(at for at, line in enumerate(said) if line.startswith("step "))
    plan = " ".join(" ".join(said[:begins]).split())
    assert "steps 2, 2 an epoch; a batch is 4 (4 at once x 1 accumulated)" in plan
    assert re.search(r"tokens [\d,]+ an epoch, of which [\d,]+ are trained on", plan)
    assert "only 2 steps follow from 6 sequences, an effective batch of 4 and 1 epoch: lower --effective-batch" in plan
    last = said[-1].removeprefix("note: measure it with: ").split()
    assert last == f"mwtool eval {tmp_path / 'out'} --attack none --attack zero:3 --on base".split()
    assert run(*last[1:3], "--limit", 1, *last[3:]).code == 0
    settings = json.loads((tmp_path / "out" / "macdrop.json").read_text())["settings"]
    assert (settings["batch_size"], settings["gradient_checkpointing"], settings["padding_free"]) == (4, False, False)


def test_the_dry_run_shows_the_plan_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    ran = finetune(folder, "--dry-run", "-o", tmp_path / "out", "--epochs", 2)
    said = " ".join(ran.out.split())
    assert ran.code == 0
    assert "steps 4, 2 an epoch; a batch is 4 (2 at once x 2 accumulated)" in said
    assert "massive: 17," in said
    assert "p 0.6 at step 1, 0.4 at step 2, 0 at step 4" in said
    assert re.search(r"adapter lora, rank 4: [\d,]+ parameters, [\d.]+%", said)
    assert "memory about" in said
    assert not (tmp_path / "out").exists()
    document = finetune(folder, "--dry-run", "--json", "--epochs", 2).document
    assert (document["schema"], document["steps"], document["p"]) == (
        "mwtool.finetune.plan/1",
        4,
        pytest.approx([0.6, 0.4, 0.2, 0.0]),
    )
    assert document["memory"]["total"] == sum(
        document["memory"][part] for part in ("weights", "adapter", "activations", "rows")
    )


def test_the_curriculum_is_drawn_without_torch_and_without_a_model() -> None:
    ran = run_apart(
        "finetune",
        "--show-curriculum",
        "--macdrop",
        "exp:0.8,alpha=0.05",
        "--max-steps",
        40,
        python=("-X", "importtime"),
    )
    assert ran.code == 0
    assert "p of exp:0.8,alpha=0.05 over 40 steps, 3 epochs" in ran.out
    assert "p 0.761 at step 1, 0.2943 at step 20, 0.1083 at step 40" in ran.out
    assert not re.search(r"\| +(torch|transformers|matplotlib)$", ran.err, flags=re.MULTILINE)
    drawn = [line.partition("│")[2] for line in ran.out.splitlines() if "│" in line]
    assert len(drawn) == 10
    heights = [sum(line[at : at + 1].strip() != "" for line in drawn) for at in range(len(drawn[-1]))]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == 8


def test_options_come_from_a_file_and_flags_win(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "half.yaml").write_text("schedule: constant:0.5\nk: 2\nseed: 9\n")
    (tmp_path / "run.yaml").write_text(
        f"data: {folder / 'text.txt'}\nmacdrop: {tmp_path / 'half.yaml'}\nrank: 2\nepochs: 1\neval-share: 0\n"
        "max_length: 16\nbatch-size: 2\neffective-batch: 4\n"
    )
    document = run("finetune", folder, "--config", tmp_path / "run.yaml", "--dry-run", "--json", "--rank", 3).document
    settings = document["settings"]
    assert (settings["rank"], settings["epochs"], settings["eval_share"]) == (3, 1, 0)
    assert (settings["curriculum"]["k"], settings["curriculum"]["seed"]) == (2, 9)
    assert document["p"] == [0.5, 0.5]
    flags = ("--k", 3, "--scope", "others", "--resample", "microbatch")
    changed = run("finetune", folder, "--config", tmp_path / "run.yaml", "--dry-run", "--json", *flags).document
    curriculum = changed["settings"]["curriculum"]
    assert [curriculum[name] for name in ("k", "scope", "resample")] == [3, "others", "microbatch"]


KILLER = """
import os, signal
import torch, mwtool.finetune.artifacts, mwtool.finetune.monitor
homes = {{"save": (torch, "save"), "mark": (mwtool.finetune.monitor, "mark"), "step": (torch.optim.AdamW, "step"),
          "figure": (mwtool.finetune.artifacts, "plot_training")}}
home, name = homes["{where}"]
original, seen = getattr(home, name), []
def killing(*args, **options):
    seen.append(1)
    if len(seen) < {count}:
        return original(*args, **options)
    if "{where}" == "save":
        open(args[1], "wb").write(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
setattr(home, name, killing)
"""


def test_all_checkpoints_can_be_kept_and_followed_from_the_base_model_on(folder: Path, tmp_path: Path) -> None:
    kept = ("--save-steps", 1, "--save-total-limit", 10, "--max-steps", 3, "--lr", 0.1, "--macdrop", "none")
    assert finetune(folder, "-o", tmp_path / "out", *kept).code == 0
    adapters = [tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2, 3)]
    ran = run("track", "--checkpoints", tmp_path / "out", "--json")
    assert [one["step"] for one in ran.document["checkpoints"]] == [1, 2, 3]
    peaks = [one["hidden"]["value"] for one in ran.document["checkpoints"]]
    assert len(set(peaks)) == 3
    whole = run("track", folder, *adapters, "--json").document["checkpoints"]
    assert [one["hidden"]["value"] for one in whole[1:]] == peaks
    assert whole[0]["massive"]["rows"][0] == 17


def test_a_run_killed_again_and_again_ends_with_the_adapter_of_the_run_that_was_not(
    folder: Path, tmp_path: Path
) -> None:
    """In the middle of a step, with a checkpoint half-written, before its mark, and before the record."""
    options = ("--save-steps", 1, "--logging-steps", 1, "--peft", "dora")
    assert finetune(folder, "-o", tmp_path / "whole", *options).code == 0
    command = [*arguments(folder, "-o", tmp_path / "cut", *options), "--resume"]
    said = []
    for where, count in (("step", 3), ("save", 5), ("mark", 1), ("figure", 1)):
        status, _, err = forked(*command, before=KILLER.format(where=where, count=count)).end()
        assert status == -signal.SIGKILL, f"{where}: {err}"
        said.append(err)
    assert not (tmp_path / "cut" / "macdrop.json").exists()
    assert "has no complete checkpoint; starting at step 1" in said[0]
    assert "resuming from" in said[1]
    assert re.search(r"checkpoint-\d is incomplete or damaged and is not used", said[2])
    last = run(*command)
    assert last.code == 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    records = [json.loads((tmp_path / name / "macdrop.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["p"] == records[1]["p"]
    assert [entry.get("eval_loss") for entry in records[0]["log"]] == [
        entry.get("eval_loss") for entry in records[1]["log"]
    ]
    again = run(*command)
    assert (again.code, "there is nothing to resume" in again.err) == (0, True)


def stopped(command: list[object], number: signal.Signals) -> tuple[int, str]:
    """Exit status and stderr of the command, to which the signal is sent once it has logged two steps."""
    process = forked(*command)
    steps = 0
    while steps < 2:
        line = process.err.readline()
        assert line, "it ended before"
        steps += line.startswith("step ")
    process.signal(number)
    status, out, err = process.end()
    assert out == ""
    return status, err


def test_signals_save_at_the_end_of_the_step_and_say_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    """Stopped twice, and the adapter is that of the run that was not."""
    options = ("--save-steps", 1000, "--logging-steps", 1, "--max-steps", 30, "--eval-share", 0)
    command = arguments(folder, "-o", tmp_path / "cut", *options)
    done = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        code, err = stopped([*command, *(["--resume"] if done else [])], number)
        found = re.search(r"stopped after step (\d+) of 30; a checkpoint is saved, add --resume to continue", err)
        assert found, err
        assert code == status
        assert int(found[1]) > done
        done = int(found[1])
        assert (tmp_path / "cut" / f"checkpoint-{done}").is_dir()
    last = run(*command, "--resume")
    assert last.code == 0
    assert f"resuming from {tmp_path / 'cut' / f'checkpoint-{done}'}" in last.err
    finetune(folder, "-o", tmp_path / "whole", *options)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_checkpoint_of_other_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    finetune(folder, "-o", tmp_path / "out", "--max-steps", 2)
    (tmp_path / "out" / "macdrop.json").unlink()
    ran = finetune(folder, "-o", tmp_path / "out", "--max-steps", 2, "--resume", "--alpha", 8)
    assert re.search(r"checkpoint-2 was made with alpha 16, and alpha is now 8: use what it was made", ran.err)
    assert ran.code == 1


def test_two_processes_show_one_progress_and_leave_one_set_of_files(folder: Path, tmp_path: Path) -> None:
    """accelerate starts several processes under this flag alone; without a card they talk through gloo."""
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split()
    command = [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "mwtool"]
    command += map(str, arguments(folder, "-o", tmp_path / "out", "--max-steps", 3, "--batch-size", 1, "--dropout", 0))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stderr.splitlines() if line.startswith("step ")] == [
        "step 1 of 3", "step 2 of 3", "step 3 of 3"
    ]  # fmt: skip
    assert done.stdout.count("the adapter is in") == 1
    record = json.loads((tmp_path / "out" / "macdrop.json").read_text())
    assert (record["processes"], record["settings"]["effective_batch"], len(record["p"])) == (2, 4, 3)
    names = {one.name for one in (tmp_path / "out").iterdir() if not one.name.startswith("checkpoint-")}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "macdrop.json", "training.png"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--macdrop", "stp:0.8"], "unknown schedule 'stp'; did you mean step?"),
        (["--macdrop", "step:1.5"], "character 6: p is 1.5; expected a number between 0 and 1"),
        (["--macdrop", "absent.yaml"], "curriculum absent.yaml cannot be read"),
        (["--batch-size", "3"], "an effective batch of 4 is no multiple of 3"),
        (["--data", "absent.json"], "absent.json does not exist"),
        (["--massive", "absent.json"], "absent.json"),
        (["--target-modules", "absent_proj"], "no adapter can be put on"),
        (["--report-to", "abacus"], "--report-to abacus"),
        (["-o", "absent/out"], "absent does not exist; create it, or save elsewhere"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_1(folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    ran = finetune(folder, "-o", tmp_path / "out", *more)
    assert message in ran.fault


@pytest.mark.parametrize(
    "more", [["--rank", "0"], ["--warmup", "2"], ["--eval-share", "0.9"], ["--device", "abacus"], ["--peft", "ia3"]]
)
def test_wrong_usage_is_exit_2(folder: Path, tmp_path: Path, more: list[str]) -> None:
    assert finetune(folder, "-o", tmp_path / "out", *more).code == 2
    assert run("finetune", folder, "-o", tmp_path / "out").code == 2
    assert run("finetune", folder, "--data", folder / "text.txt").code == 2


def test_bad_rows_stop_the_run_unless_they_are_to_be_skipped(folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": "w1 w2", "output": "w3 w4 w5"})] * 6
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"instruction": "w1"}']))
    data = ("--data", tmp_path / "rows.jsonl", "--eval-share", 0, "--max-steps", 1, "-o", tmp_path / "out")
    assert "1 of 7 records of" in (fault := finetune(folder, *data).fault)
    assert "rows.jsonl, line 7: has no output (but instruction)" in fault
    ran = finetune(folder, *data, "--skip-bad-rows", "--json")
    assert "note: 1 records that cannot be read are left out:" in ran.err
    assert (ran.document["data"]["rows"], ran.document["data"]["unreadable"]) == (6, 1)


def test_a_folder_that_is_not_empty_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    fault = finetune(folder, "-o", tmp_path).fault
    assert "exists and is not an empty folder; save elsewhere, or continue the run in it with --resume" in fault
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_saved_scan_gives_what_scanning_gives(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scan.json").write_text(text_of(scan_document(scan_checkpoint(str(folder)))))
    options = ("--dry-run", "--json", "--macdrop", "step:0.5")
    with_file, without = (
        finetune(folder, *options, *more).document for more in (["--massive", tmp_path / "scan.json"], [])
    )
    assert with_file["massive"] == without["massive"]


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(folder: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "out", "--max-steps", 3, "--save-steps", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # the adapter is larger
    try:
        ran = finetune(folder, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"out cannot be written: .*; make room, then continue with --resume", ran.err), ran.err
    assert ran.code == 1
    assert finetune(folder, *options, "--resume").code == 0


def keys(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(keys, value)) if value else set()
    return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()


def test_every_key_of_both_documents_is_described(folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([a-z_0-9]+)`", page))
    for more in (["-o", tmp_path / "out", "--max-steps", 1], ["--dry-run"]):
        assert keys(finetune(folder, *more, "--json").document) - described == set()


def test_every_flag_is_on_the_page() -> None:
    from typer.main import get_command

    from mwtool.cli import app

    command = get_command(app).commands["finetune"]  # type: ignore[attr-defined] # Typer gives a group
    flags = [option.opts for option in command.params if option.param_type_name == "option"]
    page = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")
    assert [names for names in flags if not any(f"`{name}" in page for name in names)] == []
