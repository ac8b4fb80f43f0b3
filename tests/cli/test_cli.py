"""The command line's contracts: exit status, what goes to stdout and what to stderr, options from files."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run, run_apart
from typer.main import get_command

import mwtool
from mwtool.architecture.registry import installed
from mwtool.cli import app, terminal
from mwtool.errors import ModelNotFound
from mwtool.files.figure import COLUMN, save_figure


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.model("llama", torch.bfloat16)
    tiny.plant(made)
    return tiny.saved(tmp_path_factory.mktemp("model"), made)


def test_json_is_one_document_and_output_is_the_same(model: Path, tmp_path: Path) -> None:
    ran = run("scan", model, "--json", "-o", tmp_path / "x.json", "--revision", "main")
    assert ran.code == 0
    assert ran.document["massive"]["layer"] == 1
    assert (tmp_path / "x.json").read_text() == ran.out
    assert ran.err.splitlines() == [f"note: {note}" for note in ran.document["notes"]]
    assert "--revision main is ignored" in ran.err


def test_a_document_holds_the_command_that_repeats_it(model: Path) -> None:
    first = run("scan", model, "-k", 3, "--layers", "0-6", "--json").document
    assert first["command"] == f"mwtool scan {model} -k 3 --layers 0-6 --json"
    assert run(*first["command"].split()[1:]).document == first


def test_a_figure_shows_the_states_and_what_the_ffns_add_as_the_document_has_it(model: Path, tmp_path: Path) -> None:
    document = run("scan", model, "--plot", tmp_path / "layers.png", "--json").document
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    figure = mwtool.plot_scan(document)
    hidden, intermediate, added = figure.axes
    for panel, state in ((hidden, "hidden"), (intermediate, "intermediate")):
        ranked = [[abs(entry["value"]) for entry in layer[state]["top"]] for layer in document["layers"]]
        expected = [*map(list, zip(*ranked, strict=True)), [layer[state]["median"] for layer in document["layers"]]]
        lines = panel.get_lines()
        assert [list(line.get_ydata()) for line in lines[: len(expected)]] == expected
        marks = [line.get_xdata()[0] for line in lines[len(expected) :]]
        assert marks == [event["layer"] for event in document["events"]]
    (trace,) = [one for one in document["dimensions"] if one["dimension"] == document["massive"]["dimension"]]
    points = {}
    for line in added.get_lines():
        if line.get_marker() in ("^", "v"):
            sign = 1 if line.get_marker() == "^" else -1
            points |= {at: sign * size for at, size in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert points == {at: value for at, value in enumerate(trace["written"]) if value}
    assert figure.get_figwidth() == COLUMN


def test_the_figure_of_a_scan_is_that_of_its_document_byte_for_byte(tmp_path: Path) -> None:
    model = tiny.model("llama")
    tiny.plant(model)
    scan = mwtool.scan_model(model)
    for name, drawn in (("a.svg", mwtool.plot_scan(scan)), ("b.svg", mwtool.plot_scan(scan.to_dict()))):
        save_figure(drawn, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_scan_that_finds_nothing_has_a_figure_without_a_third_panel() -> None:
    figure = mwtool.plot_scan(mwtool.scan_model(tiny.model("llama")))
    assert len(figure.axes) == 2
    assert "No massive layer." in figure._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined] # no getter


def test_a_figure_that_cannot_be_written_is_told_before_the_scan(model: Path, tmp_path: Path) -> None:
    assert "matplotlib cannot write files of type .doc" in run("scan", model, "--plot", tmp_path / "x.doc").fault
    assert "does not exist" in run("scan", model, "--plot", tmp_path / "no" / "x.png").fault


def test_without_json_the_report_shows_the_same_answer(model: Path) -> None:
    ran = run("scan", model)
    massive = run("scan", model, "--json").document["massive"]
    assert (ran.code, ran.err) == (0, "")
    for shown in (massive["module"], *massive["indices"]):
        assert str(shown) in ran.out


def test_a_model_without_massive_activations_is_no_failure(tmp_path: Path) -> None:
    plain = tiny.saved(tmp_path, tiny.model("llama"))
    ran = run("scan", plain, "--json")
    assert ran.code == 0
    assert ran.document["massive"] is None
    assert len(ran.document["layers"]) == tiny.LAYERS
    hidden = [layer["hidden"] for layer in ran.document["layers"][:-1]]
    top, median = max((abs(one["top"][0]["value"]), one["median"]) for one in hidden)
    said = " ".join(run("scan", plain).out.split())
    assert f"The largest entry of the residual stream is {top:.4g}, {top / median:,.0f} times the median" in said


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["nosuch"], "nosuch"),
        (["scan", "--nosuch"], "--nosuch"),
        (["scan", "one", "two"], "two"),
        (["scan", "-k", "0"], "-k"),
        (["scan", "-k", "many"], "-k"),
        (["scan", "--dtype", "int8"], "int8"),
        (["scan", "--ratio", "-1"], "--ratio"),
        (["scan", "--ratio", "nan"], "--ratio"),
        (["scan", "--magnitude", "inf"], "--magnitude"),
        (["scan", "--prompt", "Apple"], "--prompt"),
        (["scan", "--layers", "3-9"], "'3-9'"),
        (["scan", "--layers", "0-"], "'0-'"),
        (["scan", "--layers", "nine"], "'nine'"),
        (["scan", "--event", "-1"], "--event"),
        (["scan", "--event", "0", "--layer", "1"], "--event and --layer"),
        (["scan", "--indices", "1,x"], "'x'"),
        (["scan", "--indices", "1,1"], "names 1 twice"),
        (["ablate", "-k", "9" * 5000], "-k '999999999999999999999999999999999999...: a number has 5,000 digits"),
        (["ablate", "--layer", "1," + "9" * 5000], "a number has 5,000 digits; expected at most 9"),
        (["ablate", "--event", "9" * 5000], "a number has 5,000 digits; expected at most 9"),
        (["scan", "--config", "nosuch.yaml"], "nosuch.yaml"),
        (["adapters", "nosuch"], "nosuch"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_culprit(arguments: list[str], culprit: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert culprit in ran.err


def test_no_command_shows_the_help() -> None:
    ran = run()
    assert ran.code == 2  # as of any program that needs one
    assert all(name in ran.out + ran.err for name in ("scan", "adapters"))


def test_a_configuration_file_gives_defaults_and_flags_win(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text(f"model: {model}\nk: 3\nlayers: 0-5\nsun_ratio: 7\n")
    from_file = run("scan", "--config", file, "--json").document
    assert len(from_file["massive"]["indices"]) == 3
    assert from_file["layers_walked"] == 6
    assert from_file["thresholds"]["sun_ratio"] == 7
    flagged = run("scan", "-k", "2", "--config", file, "--json").document
    assert len(flagged["massive"]["indices"]) == 2
    assert flagged["layers_walked"] == 6


def test_a_repeatable_option_takes_one_value_or_a_list_from_a_file(tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("plain words " * 40)
    file = tmp_path / "eval.yaml"
    tasks = []
    for value in (f"ppl:{text}", [f"ppl:{text}"]):
        file.write_text(f"model: demo\ntask: {value}\nattack: none\nlimit: 1\n")
        tasks.append(run("eval", "--config", file, "--json").document["tasks"])
    assert tasks == [[f"ppl:{text}"]] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ration: 3", ["'ration'", "did you mean ratio?"]),
        ("sun-ration: 3", ["'sun-ration'", "did you mean sun-ratio?"]),
        ("zzzz: 3", ["'zzzz'", "known are", "super-weights"]),
        ("k: many", ["-k"]),
        ("- 1", ["list"]),
        ("a: [", ["cannot be read"]),
        ("seed: " + "9" * 5_000, ["cannot be read", "5,000 digits"]),
        ("k: 0x" + "f" * 5_000, ["k is an integer of 20,000 bits", "expected at most 64"]),
        ("k: " + "1:" * 3_000 + "1", ["k is an integer of", "expected at most 64"]),
        ("seed: !!int x", ["cannot be read", "'x'"]),
        ("seed: !!python/object/apply:os.getcwd []", ["cannot be read", "could not determine a constructor"]),
        ("seed: " + "[" * 5_000 + "]" * 5_000, ["nested too deeply", "expected option names and values"]),
    ],
)
def test_a_bad_configuration_file_is_wrong_usage(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "scan.yaml"
    file.write_text(text)
    ran = run("scan", "--config", file)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    shown = " ".join(ran.err.replace("│", " ").split())
    assert [word for word in words if word not in shown] == [], shown


def test_debug_shows_where_an_error_came_from() -> None:
    """The error leaves `main` as it was raised, and Python shows it."""
    with pytest.raises(ModelNotFound, match=r"^no such folder: \./nowhere$"):
        run("scan", "./nowhere", "--debug")


def test_an_error_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Among them whatever libraries print on their own when they are imported."""
    assert "no such folder" in run_apart("scan", tmp_path / "nowhere").fault


def test_what_a_library_logs_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler(shown))
    logger = logging.getLogger("a library without handlers")
    monkeypatch.setattr(logger, "propagate", False)
    for number in (1, 1, 2, 1):
        terminal.say_once()
        logger.warning("cast %d", number)
    assert shown.getvalue().splitlines() == ["cast 1", "cast 2"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("mwtool ab", ["ablate"]), ("mwtool scan --sup", ["--super-weights"]), ("mwtool scan --dtype bf", ["bfloat16"])],
)
def test_the_shell_completes_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, words: str, expected: list[str]
) -> None:
    monkeypatch.setenv("_MWTOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run().out.split() == expected


def test_version_is_the_package_s() -> None:
    assert run("--version").out == f"mwtool {mwtool.__version__}\n"


def test_adapters_lists_every_entry_point() -> None:
    document = run("adapters", "--json").document
    assert document["schema"] == "mwtool.adapters/1"
    assert [one["model_type"] for one in document["adapters"]] == [plugin.model_type for plugin in installed()]
    llama = next(one for one in document["adapters"] if one["model_type"] == "llama")
    assert (llama["distribution"], llama["version"]) == ("mwtool", mwtool.__version__)
    assert "llama" in run("adapters").out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["scan", "--help"], ["ablate", "--help"], ["adapters", "--json"]]
)
def test_nothing_heavy_is_imported_before_a_command_runs(arguments: list[str]) -> None:
    ran = run_apart(*arguments, python=("-X", "importtime"))
    assert ran.code == 0
    imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert "mwtool.cli" in imported
    assert imported & {"torch", "transformers", "numpy", "huggingface_hub", "accelerate", "peft"} == set()


def test_an_interrupted_scan_exits_with_130_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT in the middle of the walk, from where the progress bar is drawn."""

    @contextmanager
    def pressing() -> Iterator[terminal.ScanBar]:
        yield terminal.ScanBar(
            lambda done, _total, _read: signal.raise_signal(signal.SIGINT) if done == 3 else None,
            lambda _done, _total: None,
        )

    monkeypatch.setattr(terminal, "layer_progress", pressing)
    ran = run("scan", model, "--json", "-o", tmp_path / "x.json")
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_from_outside_exits_with_130(tmp_path: Path) -> None:
    """The configuration is a pipe: once it has a reader, the command is at work and waits."""
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "mwtool", "scan", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        writer = None
        while writer is None and running.poll() is None:
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # no reader yet
                time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    if writer is not None:
        os.close(writer)
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "mwtool", "adapters", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: [Errno 28] No space left on device"]


def test_a_reader_that_leaves_early_is_no_error_to_report() -> None:
    command = [sys.executable, "-m", "mwtool", "adapters", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


def test_names_are_shown_as_they_are_whatever_brackets_and_colons_they_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    named = tmp_path / "[red]a:x:[b"
    shutil.copytree(model, named)
    (text := tmp_path / "[red]t:x:[b.txt").write_text("plain words " * 40)
    assert run("scan", named).out.startswith(f"{named}: llama")
    ran = run("eval", "demo", "--task", f"ppl:{text}", "--limit", 1)
    assert "ppl:[red]t:x:[b.txt" in ran.out


@pytest.mark.parametrize("command", [[], ["scan"], ["ablate"], ["eval"], ["finetune"], ["adapters"]])
def test_no_help_text_turns_into_pictures(command: list[str]) -> None:
    assert not re.search("[\u2700-\u27bf\U0001f000-\U0001faff]", run(*command, "--help").out)


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_no_number_and_no_name_is_cut_in_a_narrow_terminal(
    model: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    report, tables = run("scan", model).out, run("scan", model, "--states", "--super-weights", "--protect").out
    assert "…" not in report + tables
    assert max(map(len, report.splitlines())) <= int(columns)
    if int(columns) >= 80:
        assert max(map(len, tables.splitlines())) <= int(columns)
    for place in run("scan", model, "--json").document["weights"]:
        assert f"{place['parameter']} " in tables


def test_redirected_output_is_as_wide_as_its_tables(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert " parameters, bfloat16 on cpu\n" in run("scan", model).out


def test_usage_and_completion_name_the_command_however_it_is_started() -> None:
    assert "Usage: mwtool scan [OPTIONS] " in run_apart("scan", "--help").out
    assert "_MWTOOL_COMPLETE=complete_bash" in run_apart(_MWTOOL_COMPLETE="source_bash").out


@pytest.mark.parametrize("command", ["scan", "ablate", "eval", "finetune"])
def test_every_option_says_what_it_is_for(command: str) -> None:
    click: Any = get_command(app)
    assert [p.name for p in click.commands[command].params if not p.help] == []


def test_the_many_options_of_a_run_are_grouped() -> None:
    panels = re.findall(r"^([A-Z].*):$", run("finetune", "--help").out, flags=re.MULTILINE)
    assert panels[:2] == ["Arguments", "Required"]
    assert {"Data", "PEFT adapter", "MacDrop", "Training", "Run"} < set(panels)
    assert panels[-2:] == ["Configuration and output", "Examples"]


def test_tables_asked_for_take_the_place_of_the_report(model: Path) -> None:
    report = run("scan", model).out
    assert "Massive layer 1" in report
    for flag, words in (("--states", "max |z|"), ("--super-weights", "FFN index"), ("--protect", "down_proj.weight")):
        shown = run("scan", model, flag)
        assert (shown.code, shown.err) == (0, "")
        assert words in shown.out
        assert words not in report
        assert "Massive layer" not in shown.out


def test_another_event_or_layer_can_be_chosen(model: Path) -> None:
    chosen = run("scan", model, "--layer", 3, "--indices", "5,2", "--json").document
    assert (chosen["massive"]["layer"], chosen["massive"]["indices"]) == (3, [5, 2])
    assert chosen["by_hand"] == {"event": None, "layer": 3, "expert": None, "indices": [5, 2]}
    shown = " ".join(run("scan", model, "--layer", 3, "--indices", "5,2").out.split())
    assert "Chosen by hand: layer 3" in shown
    assert "--layer 3 --indices 5,2" in shown
    first = run("scan", model, "--event", 0, "--json").document
    assert first["massive"] == first["events"][0]["rows"]
