"""`mwtool quantize-check` and `mwtool export` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import run

QUICK = ["--bits", "4", "-k", "1", "--limit", "4", "--window", "64"]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.json"
    assert run("scan", "demo", "-o", path).code == 0
    return path


def test_the_table_the_document_and_the_file_tell_the_same(tmp_path: Path) -> None:
    done = run("quantize-check", "demo", *QUICK, "--json", "-o", tmp_path / "found.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads((tmp_path / "found.json").read_text()) == done.document
    shown = run("quantize-check", "demo", *QUICK).out
    assert "4 bits in groups of 64" in shown
    for variant in done.document["variants"]:
        assert (variant["protected"] or "nothing") in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "1"], "expected numbers from 2 to 8"),
        (["--bits", "9"], "expected numbers from 2 to 8"),
        (["--group", "half"], "expected row or a number"),
        (["-k", "1000"], "k is 1000"),
        (["--task", "ppl:nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert words in run("quantize-check", "demo", *arguments).fault


def test_keeping_no_column_is_wrong_usage() -> None:
    assert run("quantize-check", "demo", "-k", "0").code == 2


def test_an_export_goes_to_stdout_and_what_it_is_to_stderr(scan: Path, tmp_path: Path) -> None:
    done = run("export", scan, "--to", "llama.cpp", "--bits", "8", "--event", "0")
    assert (done.code, done.out) == (0, "blk\\.1\\.ffn_(gate|up|down)\\.weight=q8_0\n")
    assert "whole matrices, kept at 8 bits" in done.err
    assert run("export", scan, "--to", "llama.cpp", "--bits", "8", "--event", "0", "-o", tmp_path / "types").out == ""
    assert (tmp_path / "types").read_text() == done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "torcho"], "did you mean torchao?"),
        (["--to", "hqq", "--bits", "8"], "can only leave modules unquantized"),
        (["--to", "mlx", "--event", "9"], "event 9 does not exist"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_one_line(scan: Path, arguments: list[str], words: str) -> None:
    assert words in run("export", scan, *arguments).fault


def test_what_is_no_scan_of_this_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"schema": "mwtool.scan/1"}))
    assert "expected 'mwtool.scan/2'" in run("export", tmp_path / "old.json", "--to", "mlx").fault
    assert "no.json" in run("export", tmp_path / "no.json", "--to", "mlx").fault
