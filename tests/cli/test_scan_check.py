"""`mwtool scan --check` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from command import run
from words import planted_folder

SMALL = ("--limit", 4, "--window", 32, "-k", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "long.txt"
    path.write_text(" ".join([(folder / "text.txt").read_text()] * 3))
    return path


def test_the_document_has_the_check_and_the_file_is_the_same(folder: Path, text: Path, tmp_path: Path) -> None:
    ran = run("scan", folder, "--check", text, *SMALL, "--json", "-o", tmp_path / "scan.json")
    document = ran.document
    assert document == json.loads((tmp_path / "scan.json").read_text())
    check = document["check"]
    assert (check["text"], check["k"], check["windows"], check["tokens"]) == (str(text), 2, 4, 4 * 31)
    assert [one["event"] for one in check["events"]] == list(range(len(document["events"])))
    assert [one["indices"] for one in check["events"]] == [one["rows"]["indices"] for one in document["events"]]
    assert check["predicted"] == document["massive_event"]
    for note in check["notes"]:
        assert f"note: {note}" in ran.err
    without = run("scan", folder, "-k", 2, "--json").document
    assert {**document, "check": None, "command": None} == {**without, "command": None}


def test_the_ratios_are_those_of_ablate_on_the_same_windows(folder: Path, text: Path, tmp_path: Path) -> None:
    """`ablate --event` reads the rows from the scan, whatever else is in it."""
    scan = tmp_path / "scan.json"
    check = run("scan", folder, "--check", text, *SMALL, "--json", "-o", scan).document["check"]
    task = ("--task", f"ppl:{text}", "--window", 32, "--limit", 4)
    for one in check["events"]:
        where = ("--massive", scan, "--event", one["event"], "-k", 2, "--no-controls")
        runs = run("ablate", folder, *task, *where, "--json").document["runs"]
        assert [next(iter(each["ratio"].values())) for each in runs] == [one["zero"]["ratio"], one["retain"]["ratio"]]


def test_the_report_has_a_column_for_each_attack_and_the_conclusion(folder: Path, text: Path) -> None:
    ran = run("scan", folder, "--check", text, *SMALL)
    assert ran.code == 0
    assert "zero 2" in ran.out
    assert "retain 2" in ran.out
    assert "Checked: this model " in ran.out
    assert "4 windows of" in " ".join(ran.out.split())


def test_alone_it_means_the_bundled_text() -> None:
    """At the end of the line and before another option, with MODEL before it."""
    small = ("--limit", 1, "--window", 32, "-k", 1)
    for arguments in (("scan", "demo", *small, "--json", "--check"), ("scan", "demo", "--check", "--json", *small)):
        check = run(*arguments).document["check"]
        assert (check["text"], check["windows"]) == ("demo", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("w1 w2", "--check needs at least 128, 4 windows of 32: give a longer text"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(
    folder: Path, tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fault = run("scan", folder, "--check", path, *SMALL).fault
    assert message in fault
    assert "short.txt" in fault


def test_a_text_that_is_not_there_is_one_line_before_anything_is_scanned(folder: Path) -> None:
    assert "absent.txt does not exist" in run("scan", "no-such-model", "--check", "absent.txt", *SMALL).fault
    assert "absent.txt does not exist" in run("scan", folder, "--check", "ppl:absent.txt", *SMALL).fault


def test_a_text_may_be_named_as_other_commands_name_it(folder: Path, text: Path) -> None:
    check = run("scan", folder, "--check", f"ppl:{text}", *SMALL, "--json").document["check"]
    assert (check["text"], check["windows"]) == (str(text), 4)


def test_a_model_without_events_or_without_a_tokenizer_is_one_line(tmp_path: Path, text: Path) -> None:
    quiet = tiny.saved(tmp_path / "quiet", tiny.quiet(tiny.model("llama")))
    assert "found no event, so there is nothing to check" in run("scan", quiet, "--check", text, *SMALL).fault
    made = tiny.model("llama")
    tiny.plant(made)
    mute = tiny.saved(tmp_path / "mute", made)
    assert "has no tokenizer; --check needs one to read text" in run("scan", mute, "--check", text, *SMALL).fault


@pytest.mark.parametrize("arguments", [("--check", "."), ("--limit", 0), ("--window", 31)])
def test_wrong_usage_is_exit_2(folder: Path, arguments: tuple[object, ...]) -> None:
    ran = run("scan", folder, *arguments)
    assert (ran.code, ran.out) == (2, "")


@pytest.mark.parametrize("option", ["--check", "--sinks", "--text"])
def test_an_option_that_took_the_model_for_its_text_says_so(folder: Path, option: str) -> None:
    ran = run("scan", option, folder)
    assert ran.code == 2
    assert f"write MODEL before {option}" in " ".join(ran.err.split())
