"""`--table FILE` of every command, and of its document later."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from command import Ran, run
from finetuning import arguments
from questions import CHOICES, CLOZE, rows
from words import planted_folder

from mwtool.errors import BadValue
from mwtool.report.table import TABLES, table_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = planted_folder(tmp_path_factory.mktemp("model"))
    for kind, found in (("mc", CHOICES), ("cloze", CLOZE)):
        rows(folder, kind, found)
    return folder


def commands(folder: Path, made: Path) -> dict[str, list[object]]:
    task = ["--task", f"ppl:{folder / 'text.txt'}", "--window", 16]
    several = [*task, "--task", f"mc:{folder / 'mc.jsonl'}", "--task", f"cloze:{folder / 'cloze.jsonl'}"]
    checked = ["--check", folder / "text.txt", "--limit", 2, "--window", 32]
    return {
        "mwtool.scan/2": ["scan", folder, *checked],
        "mwtool.ablate/1": ["ablate", folder, *several, "-k", "0,1", "--draws", 2],
        "mwtool.eval/1": ["eval", folder, *several, "--attack", "none", "--attack", "zero:1"],
        "mwtool.comparison/1": ["eval", "--compare", folder, made / "mwtool.eval-1.json", *several],
        "mwtool.compare/1": ["compare", made / "mwtool.scan-2.json", made / "mwtool.scan-2.json"],
        "mwtool.quantize-check/1": ["quantize-check", folder, *task, "-k", 1],
    }


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Document and CSV of every schema, each written by its command."""
    place = tmp_path_factory.mktemp("made")
    for schema, command in commands(folder, place).items():
        name = schema.replace("/", "-")
        ran = run(*command, "-o", place / f"{name}.json", "--table", place / f"{name}.csv")
        assert ran.code == 0, ran
    name = "mwtool.finetune-1"
    ran = run(*arguments(folder, "-o", place / "run", "--max-steps", 2, "--table", place / f"{name}.csv"))
    assert ran.code == 0, ran
    (place / f"{name}.json").write_text((place / "run" / "macdrop.json").read_text())
    return place


def document(made: Path, schema: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made / f"{schema.replace('/', '-')}.json").read_text())
    assert found["schema"] == schema
    return found


def lines(made: Path, schema: str) -> list[dict[str, str]]:
    return list(csv.DictReader((made / f"{schema.replace('/', '-')}.csv").read_text().splitlines()))


def tabled(*paths: Path, to: Path) -> Ran:
    return run("report", *paths, "--table", to)


@pytest.mark.parametrize("schema", TABLES)
def test_the_table_of_a_command_is_that_of_its_document(made: Path, schema: str, tmp_path: Path) -> None:
    name = schema.replace("/", "-")
    assert tabled(made / f"{name}.json", to=tmp_path / "t.csv").code == 0
    assert (tmp_path / "t.csv").read_text() == (made / f"{name}.csv").read_text()
    for suffix, begins in ((".tex", r"% needs \usepackage{booktabs}"), (".md", "")):
        assert tabled(made / f"{name}.json", to=tmp_path / f"t{suffix}").code == 0
        assert (tmp_path / f"t{suffix}").read_text().startswith(begins)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["t.csv", "t.md", "t.tex"]  # and no page


def test_events_have_rows_and_the_ratios_of_the_check_with_their_bounds(made: Path) -> None:
    whole = document(made, "mwtool.scan/2")
    (line,) = lines(made, "mwtool.scan/2")
    event, check = whole["events"][0], whole["check"]["events"][0]
    assert (line["layer"], line["row"]) == (str(event["layer"]), str(event["rows"]["indices"][0]))
    assert float(line["zero"]) == check["zero"]["ratio"]
    assert float(line["written"]) == event["written"]


def test_an_ablation_has_each_attack_beside_the_mean_of_its_controls(made: Path) -> None:
    whole, found = document(made, "mwtool.ablate/1"), lines(made, "mwtool.ablate/1")
    task = next(name for name in whole["baseline"] if name.startswith("ppl:"))
    line = next(one for one in found if (one["attack"], one["k"], one["task"]) == ("zero", "1", "ppl:text.txt"))
    ranked, *controls = [one for one in whole["runs"] if (one["mode"], one["k"]) == ("zero", 1)]
    assert float(line["value"]) == ranked["results"][task]
    assert [float(line[key]) for key in ("ratio_low", "ratio_high")] == ranked["interval"][task]
    random = [one["ratio"][task] for one in controls if one["control"] != "norm"]
    assert float(line["random"]) == pytest.approx(math.fsum(random) / 2)
    assert (float(line["random_least"]), float(line["random_most"])) == (min(random), max(random))
    means = [one for one in found if one["task"] == "mean acc of 2 tasks"]
    assert [float(one["value"]) for one in means] == [one["value"] for one in whole["means"] if one["control"] is None]


def test_results_are_compared_with_the_first_of_their_kind_and_end_with_their_mean(made: Path) -> None:
    whole, found = document(made, "mwtool.eval/1"), lines(made, "mwtool.eval/1")
    assert [float(one["value"]) for one in found[: len(whole["results"])]] == [one["value"] for one in whole["results"]]
    assert {one["change"] for one in found if one["attack"] == "none"} == {""}
    attacked = next(one for one in found if one["attack"] == "zero:1" and one["metric"] == "perplexity")
    assert (
        float(attacked["beside_first_low"]) <= float(attacked["beside_first"]) <= float(attacked["beside_first_high"])
    )
    assert found[-1]["task"] == "mean of 2 tasks"
    pairs = document(made, "mwtool.comparison/1")["pairs"]
    compared = [
        one for one in lines(made, "mwtool.comparison/1") if one["change"] and not one["task"].startswith("mean")
    ]
    assert [float(one["beside_first"]) for one in compared] == [
        pytest.approx(one["value"]) for one in pairs if one["value"] is not None
    ]


def test_scans_side_by_side_have_the_fate_of_each_row(made: Path) -> None:
    (line,) = lines(made, "mwtool.compare/1")
    event = document(made, "mwtool.compare/1")["events"][0]
    assert line["kept"] == " ".join(str(row["row"]) for row in event["rows"] if row["fate"] == "kept")
    assert (line["found_in"], line["after_a"], line["after_b"]) == (
        "both",
        str(event["after_a"]),
        str(event["after_b"]),
    )


def test_quantization_has_what_each_protection_gives_back(made: Path) -> None:
    whole, found = document(made, "mwtool.quantize-check/1"), lines(made, "mwtool.quantize-check/1")
    assert found[0]["protected"] == "everything"
    assert [float(one["ratio"]) for one in found[1:]] == [one["ratios"][0]["value"] for one in whole["variants"]]
    assert [one["protected"] for one in found[1:]] == [one["protected"] or "nothing" for one in whole["variants"]]


def test_a_run_has_its_losses_at_both_ends(made: Path) -> None:
    measured, found = document(made, "mwtool.finetune/1")["measured"], lines(made, "mwtool.finetune/1")
    assert (float(found[0]["first"]), float(found[0]["last"])) == (measured["first_loss"], measured["last_loss"])


def test_documents_of_one_model_share_a_file_and_other_names_are_refused(
    folder: Path, made: Path, tmp_path: Path
) -> None:
    both = (made / "mwtool.scan-2.json", made / "mwtool.eval-1.json")
    assert tabled(*both, to=tmp_path / "t.tex").code == 0
    assert (tmp_path / "t.tex").read_text().count(r"\begin{table}") == 2
    assert "a CSV file has one table, and there are 2" in tabled(*both, to=tmp_path / "t.csv").fault
    assert "tables are written as .tex, .csv, .md" in run("scan", folder, "--table", tmp_path / "t.doc").fault
    assert not (tmp_path / "t.csv").exists()
    with pytest.raises(BadValue, match=r"a document of schema 'x' has no table; expected one of mwtool.scan/2"):
        table_of({"schema": "x"})


def test_wrong_usage_is_exit_2(folder: Path, tmp_path: Path) -> None:
    both = ("-o", tmp_path / "a.md", "--table", tmp_path / "a.md")
    assert run("scan", folder, *both).code == 2
    assert run(*arguments(folder, "--dry-run", "--table", tmp_path / "a.md")).code == 2
    assert run("finetune", "--show-curriculum", "--table", tmp_path / "a.md").code == 2
