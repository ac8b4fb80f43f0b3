"""`--format human|agent|json|quiet`, as the hf CLI has it, and what an agent that runs a command gets."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from command import run
from rich.console import Console
from words import planted_folder

from mwtool.cli import formats, terminal
from mwtool.cli.commands import SUMMARIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("model") / "base", num_hidden_layers=4)


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in formats.AGENTS:
        monkeypatch.delenv(name, raising=False)


def test_format_json_equals_json(folder: Path) -> None:
    found = [run("scan", folder, *way) for way in (["--json"], ["--format", "json"], ["--format=json"])]
    documents = [{**json.loads(one.out), "command": None} for one in found]
    assert documents[0] == documents[1] == documents[2]


def test_quiet_writes_files_and_prints_nothing(folder: Path, tmp_path: Path) -> None:
    ran = run("scan", folder, "--format", "quiet", "-o", tmp_path / "scan.json")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert json.loads((tmp_path / "scan.json").read_text())["massive"]["layer"] == 1
    ran = run("scan", folder.parent / "absent", "--format", "quiet")
    assert (ran.code, ran.out) == (1, "")
    assert ran.fault


@pytest.mark.parametrize("name", formats.AGENTS)
def test_agents_get_plain_text_without_bars(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    human = run("scan", folder)
    monkeypatch.setenv(name, "some-agent")
    monkeypatch.setattr(terminal, "_stderr", Console(stderr=True, force_terminal=True, quiet=True))
    ran = run("scan", folder)
    assert formats.mode() == "agent"
    assert not terminal.progressing()
    assert ran.out == human.out  # what is said is the same
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in run("scan", folder).out
    assert run("scan", folder, "--format", "human").code == 0
    assert (formats.mode(), terminal.progressing()) == ("human", True)


def test_two_formats_exclude_each_other_and_others_do_not_exist(folder: Path) -> None:
    assert run("scan", folder, "--json", "--format", "quiet").code == 2
    assert run("scan", folder, "--format", "yaml").code == 2


def test_finetune_tells_the_format_of_data_from_that_of_the_answer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(f"w{n} w{n + 1} w3" for n in range(24)))
    given = ("finetune", folder, "--data", tmp_path / "t.txt", "--dry-run", "--device", "cpu")
    ran = run(*given, "--format", "text", "--format", "json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)
    assert run(*given, "--format", "nothing").code == 2


def test_every_command_that_answers_in_json_has_the_option() -> None:
    for name in SUMMARIES:
        text = run(name, "--help").out
        assert "--json" not in text or "--format" in text or name == "adapters", name


def test_a_scan_shows_bytes_speed_and_time_left_on_a_terminal_and_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("scan", "demo").err == ""
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "_stderr", console)
    with terminal.layer_progress() as bar:
        bar.on_bytes(1_000_000, 4_000_000)
        bar.on_layer(1, 4, 1_000_000)
        bar.on_bytes(2_000_000, 4_010_000)  # about as many: what is shown stays
        bar.on_bytes(4_010_000, 4_010_000)
    lines = shown.getvalue()
    assert "layer 1 of 4," in lines
    assert "4.0/4.0 MB" in lines
    assert "left" in lines
