"""`--plot` and `--report` on every command that makes a document: drawn from the document, and from nothing else."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from command import run
from finetuning import QUICK
from words import planted_folder

from mwtool.files.document import text_of
from mwtool.files.figure import save_figure
from mwtool.report.page import page_of
from mwtool.report.plot import figure_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


def arguments(command: str, folder: Path, output: Path) -> list[Any]:
    task = ["--task", f"ppl:{folder / 'text.txt'}", "--window", 16, "--limit", 4, "-o", output]
    return {
        "scan": ["scan", folder, "-o", output],
        "ablate": ["ablate", folder, "-k", 1, "--draws", 1, *task],
        "eval": ["eval", folder, "--attack", "none", "--attack", "zero:1", *task],
        "compare": ["eval", "--compare", folder, f"{folder}/", *task],
        "scans": ["compare", folder, folder, "-o", output],
        "track": ["track", folder, "-o", output],
        "quantize-check": ["quantize-check", folder, "--bits", 3, "-k", 1, "--group", "row", *task],
        "finetune": ["finetune", folder, "--data", folder / "text.txt", *QUICK, "--max-steps", 2, "-o", output],
    }[command]


@pytest.mark.parametrize(
    "command", ["scan", "scans", "track", "ablate", "eval", "compare", "quantize-check", "finetune"]
)
def test_page_and_figure_are_those_of_the_document_alone(command: str, folder: Path, tmp_path: Path) -> None:
    output, page, plot = tmp_path / "found", tmp_path / "page.html", tmp_path / "figure.svg"
    assert run(*arguments(command, folder, output), "--report", page, "--plot", plot).code == 0
    document = json.loads((output / "macdrop.json" if command == "finetune" else output).read_text())
    assert page.read_text(encoding="utf-8") == page_of([document])
    save_figure(figure_of(document), tmp_path / "again.svg")
    assert plot.read_bytes() == (tmp_path / "again.svg").read_bytes()
    if command == "finetune":
        page.unlink()
        assert run(*arguments(command, folder, output), "--resume", "--report", page).code == 0
        assert page.read_text(encoding="utf-8") == page_of([document])


@pytest.mark.parametrize("command", ["scan", "scans", "track", "ablate", "eval", "quantize-check", "finetune"])
def test_what_cannot_be_written_is_refused_before_any_work(command: str, folder: Path, tmp_path: Path) -> None:
    given = arguments(command, folder, tmp_path / "found")
    assert "does not exist; create it" in run(*given, "--report", tmp_path / "no" / "page.html").fault
    assert "matplotlib cannot write files of type .doc" in run(*given, "--plot", tmp_path / "x.doc").fault
    twice = run(*given, "--report", tmp_path / "x.svg", "--plot", tmp_path / "x.svg")
    assert (twice.code, twice.out) == (2, "")
    assert "--plot and --report both name" in " ".join(twice.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_former_page_and_what_was_measured(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the page is larger
    try:
        ran = run("scan", folder, "--report", tmp_path / "page.html", "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "page.html could not be written: File too large; no partial file is left" in ran.err
    assert ran.document["schema"] == "mwtool.scan/2"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "former"


def test_a_dry_run_has_nothing_to_draw(folder: Path, tmp_path: Path) -> None:
    ran = run("finetune", folder, "--data", folder / "text.txt", "--dry-run", "--report", tmp_path / "page.html")
    assert (ran.code, list(tmp_path.iterdir())) == (2, [])
    assert "--dry-run trains nothing" in " ".join(ran.err.split())


def test_a_page_of_two_files_is_that_of_both_documents(folder: Path, tmp_path: Path) -> None:
    for command in ("scan", "eval"):
        assert run(*arguments(command, folder, tmp_path / f"{command}.json")).code == 0
    (tmp_path / "records.json").write_text("[1, 2]")  # no document: left alone in a folder
    assert run("report", tmp_path, "-o", tmp_path / "page.html").code == 0
    both = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("scan", "eval")]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page_of(both)
    broken = json.loads(text_of(both[0]))
    del broken["layers"]
    (tmp_path / "scan.json").write_text(text_of(broken))
    fault = run("report", tmp_path / "scan.json", "-o", tmp_path / "page.html").fault
    assert "scan.json is no complete mwtool.scan/2 document (layers: field required); write it again" in fault
