"""A study on a tiny model: what its folder holds, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import Ran, run
from questions import CHOICES, rows
from words import planted_folder, with_tokenizer

QUICK = "--max-steps 2 --effective-batch 4 --batch-size 2 --max-length 16 --rank 2 --window 16 --draws 1 --limit 6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = planted_folder(tmp_path_factory.mktemp("model"))
    rows(made, "mc", CHOICES)
    return made


def reproduce(model: Path, output: Path, *more: object) -> Ran:
    given = ["--texts", f"words={model / 'text.txt'}", "--tasks", f"mc:{model / 'mc.jsonl'}"]
    return run("reproduce", model, "-o", output, "--data", model / "text.txt", *given, *QUICK.split(), *more)


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "study"
    ran = reproduce(folder, output, "--only", "table1,table3,table4", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert ran.document == document_in(output)
    return output


def document_in(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "reproduction.json").read_text()))


def line(document: dict[str, Any], table: str, label: str) -> dict[str, Any]:
    (found,) = (one for one in document["tables"] if one["name"] == table)
    return dict(next(one for one in found["lines"] if one["label"] == label))


def test_every_cell_is_what_the_command_of_its_line_measures(study: Path, tmp_path: Path) -> None:
    document = document_in(study)
    attacked = line(document, "table4", "DoRA, step:0.8, zero:3")
    command = next(one for one in attacked["commands"] if "base.texts.json" in one).split()[1:]
    command[command.index("-o") + 1] = str(tmp_path / "again.json")
    assert run(*command).code == 0
    plain, zeroed = json.loads((tmp_path / "again.json").read_text())["results"]
    cell = attacked["cells"]["words"]
    assert (cell["value"], cell["seeds"]) == (zeroed["value"], [0])
    assert cell["change"]["value"] == pytest.approx(zeroed["value"] / plain["value"])
    assert cell["interval"][0] < cell["value"] < cell["interval"][1]


def test_the_adapter_is_the_one_that_finetune_trains_bit_for_bit(study: Path, tmp_path: Path) -> None:
    trained = line(document_in(study), "table3", "LoRA, step:0.8")["commands"][0].split()[1:]
    name = Path(trained[trained.index("-o") + 1]).name
    trained[trained.index("-o") + 1] = str(tmp_path / "again")
    assert run(*trained).code == 0
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (study / name / "adapter_model.safetensors").read_bytes()


def test_a_finished_study_is_not_measured_again_and_seeds_may_be_added(folder: Path, study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.glob("*/*.json")}
    ran = reproduce(folder, study, "--only", "table3", "--device", "cpu", "--seeds", 2)
    assert ran.code == 0, ran.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    cell = line(document_in(study), "table3", "LoRA, step:0.8")["cells"]["words"]
    assert (cell["seeds"], cell["over"], len(cell["values"])) == ([0, 1], "seeds", 2)
    low, high = cell["interval"]
    assert low < min(cell["values"]) <= cell["value"] <= max(cell["values"]) < high


def test_controls_are_means_over_draws_of_what_ablate_measured(folder: Path, study: Path) -> None:
    assert reproduce(folder, study, "--only", "figure4", "--device", "cpu").code == 0
    document = document_in(study)
    for column, name in (("words", "ablation.json"), ("mc", "ablation.tasks.json")):
        sweep = json.loads((study / name).read_text())
        runs = [one for one in sweep["runs"] if (one["mode"], one["k"], one["control"]) == ("zero", 5, "random:0")]
        key = next(one["name"] for one in sweep["tasks"] if one["metric"] in ("perplexity", "acc_norm"))
        scale = 1 if column == "words" else 100
        cell = line(document, "figure4", "zero:5, random rows")["cells"][column]
        assert (cell["over"], cell["seeds"]) == ("draws", [0])
        assert cell["value"] == pytest.approx(scale * runs[0]["results"][key])
    assert {path.name for path in study.glob("*.svg")} == {"figure4.svg", "figure4.texts.svg"}
    assert document["parts"] == ["table1", "figure4", "table3", "table4"]
    assert document["complete"] is True


def test_every_key_of_the_document_is_described(study: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
    described = set(
        re.findall(r"`([a-z0-9_]+)`", text.split("\n## ")[1] + text.partition("## `mwtool.reproduction/1`")[2])
    )
    document = document_in(study)
    attacked = line(document, "table4", "DoRA, step:0.8, zero:3")
    cell = attacked["cells"]["words"]
    names = {*document, *document["tables"][0], *document["tables"][0]["columns"][0], *attacked, *cell, *cell["change"]}
    assert names - described == set()


def test_a_study_that_went_on_elsewhere_says_how_much_was_measured_with_what(
    folder: Path, study: Path, tmp_path: Path
) -> None:
    shutil.copytree(study, tmp_path / "moved")
    path = tmp_path / "moved" / "base.texts.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
    notes = reproduce(folder, tmp_path / "moved", "--only", "table3", "--device", "cpu", "--json").document["notes"]
    mixed = [note for note in notes if " evaluations were made with mwtool " in note]
    assert [note.endswith(("on cpu", "on cuda:0")) for note in mixed] == [True, True]
    assert mixed[1].startswith("1 of ")
    assert not any(" evaluations were made " in note for note in document_in(study)["notes"])


def test_what_macdrop_changes_stands_beside_training_without_it(study: Path) -> None:
    document = document_in(study)
    one = line(document, "table4", "DoRA, step:0.8, zero:3 merged, beside none")
    values = [
        line(document, "table4", f"DoRA, {name}, zero:3 merged")["cells"]["words"]["value"]
        for name in ("step:0.8", "without MacDrop")
    ]
    assert one["cells"]["words"]["change"]["value"] == pytest.approx(values[0] / values[1])


def test_the_page_has_every_line_with_interval_and_command_and_report_reads_the_folder(
    study: Path, tmp_path: Path
) -> None:
    page = (study / "reproduction.md").read_text()
    for table in document_in(study)["tables"]:
        for one in table["lines"]:
            assert f"| {one['label']} |" in page
            assert all(command in page for command in one["commands"])
    assert run("report", study, "-o", tmp_path / "report.html").code == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "0.5"], "holds a study with training.lr 0.0001, now it is 0.5: use the same to resume"),
        (["--task", "mc:nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_other_settings_and_files_that_are_not_there_are_refused(
    folder: Path, study: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    output = study if "--lr" in more else tmp_path / "new"
    assert message in reproduce(folder, output, *more, "--device", "cpu").fault


def test_the_folder_of_another_model_and_one_with_other_files_are_refused(
    folder: Path, study: Path, tmp_path: Path
) -> None:
    assert "holds a study with model" in run("reproduce", "demo", "-o", study, "--device", "cpu").fault
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not an empty folder" in reproduce(folder, tmp_path, "--device", "cpu").fault


def test_a_model_without_massive_weights_gives_a_page_that_says_so(tmp_path: Path) -> None:
    bare = with_tokenizer(tmp_path / "bare", tiny.model("llama"))
    rows(bare, "mc", CHOICES)
    ran = reproduce(bare, tmp_path / "study", "--only", "table1,table3", "--device", "cpu")
    assert ran.code == 0, ran.err
    page = (tmp_path / "study" / "reproduction.md").read_text()
    assert "The scan found no massive weights" in page
    labels = [one["label"] for table in document_in(tmp_path / "study")["tables"] for one in table["lines"]]
    assert set(labels) == {"original", "LoRA, without MacDrop", "DoRA, without MacDrop"}
    assert document_in(tmp_path / "study")["complete"] is True  # nothing is left that could be measured
    assert "not complete" not in page


def test_a_run_that_fails_is_named_with_its_command_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mwtool.errors import MwtoolError
    from mwtool.reproduction import steps

    plain = steps.train_run

    def failing(config: Any, run: Any, on_step: Any = None) -> None:
        if run.peft == "dora":
            raise MwtoolError("out of memory")
        plain(config, run, on_step)

    monkeypatch.setattr(steps, "train_run", failing)
    ran = reproduce(folder, tmp_path / "study", "--only", "table3", "--device", "cpu")
    assert ran.code == 1
    failures = document_in(tmp_path / "study")["failures"]
    assert [one["error"] for one in failures] == ["out of memory"] * 2
    assert all("mwtool finetune" in one["command"] and "--peft dora" in one["command"] for one in failures)
    assert "out of memory" in (tmp_path / "study" / "reproduction.md").read_text()
    assert line(document_in(tmp_path / "study"), "table3", "LoRA, step:0.8")["cells"]["words"]["value"]
    monkeypatch.undo()
    assert reproduce(folder, tmp_path / "study", "--only", "table3", "--device", "cpu").code == 0
    assert document_in(tmp_path / "study")["failures"] == []


def test_a_dry_run_counts_what_is_left_measures_a_trial_and_leaves_nothing(
    folder: Path, study: Path, tmp_path: Path
) -> None:
    ran = reproduce(folder, tmp_path / "new", "--only", "table3", "--device", "cpu", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "new").exists()
    plan = ran.document
    assert len(plan["runs"]) == 4
    assert plan["evaluations"] == 2 + 2 * 4
    assert set(plan["trial"]["step"]) == {"lora", "dora"}
    assert plan["trial"]["steps"] == 2
    assert min(plan["trial"]["texts"], plan["trial"]["tasks"], *plan["trial"]["step"].values(), plan["memory"]) > 0
    left = reproduce(folder, study, "--only", "table3", "--device", "cpu", "--dry-run")
    assert "left to do     0 fine-tuning runs, 0 evaluations" in left.out


def test_runs_side_by_side_are_those_of_one_process_and_one_that_fails_is_named(
    folder: Path, study: Path, tmp_path: Path
) -> None:
    blocked = "dora-step-0.8-lr0.0001-seed0"
    output = tmp_path / "study"
    assert reproduce(folder, output, "--only", "scan", "--device", "cpu").code == 0
    (output / blocked).write_text("a file where the folder of this run is to be")
    ran = reproduce(folder, output, "--only", "table3", "--device", "cpu", "--jobs", 2)
    assert ran.code == 1
    assert "1 runs failed; they are tried again" in ran.err
    assert [one["step"] for one in document_in(output)["failures"]] == [blocked]
    for name in ("lora-none", "lora-step-0.8", "dora-none"):
        trained = [
            (one / f"{name}-lr0.0001-seed0" / "adapter_model.safetensors").read_bytes() for one in (study, output)
        ]
        assert trained[0] == trained[1]
