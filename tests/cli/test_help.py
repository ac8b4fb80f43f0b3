"""Help that fits 80 columns, spellings of other tools, and streams that cannot show everything."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from command import run, run_apart
from typer.main import get_command

from mwtool.cli import app, memory_limit, waiting
from mwtool.cli.commands import SUMMARIES
from mwtool.cli.options import WrongUsage
from mwtool.cli.spelling import misspelled, respelled
from mwtool.evaluation.config import EvalConfig
from mwtool.finetune.config import Asked, Recipe
from mwtool.models.load_options import LoadOptions
from mwtool.scan.settings import Settings

COMMANDS = [
    [], ["scan"], ["ablate"], ["eval"], ["finetune"], ["report"], ["reproduce"], ["compare"], ["track"],
    ["quantize-check"], ["export"], ["adapters"], ["adapters", "check"], ["adapters", "new"],
]  # fmt: skip
GROUP: Any = get_command(app)


def params(command: str) -> list[Any]:
    found: list[Any] = GROUP.commands[command].params
    return found


def default(command: str, name: str) -> Any:
    return next(param.default for param in params(command) if param.name == name)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_cuts_no_name(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(*command, "--help")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    assert re.search(r"…|<\w+>|<bool>|\[default: \(|-$", ran.out, flags=re.MULTILINE) is None
    target = GROUP
    for name in command:
        target = target.commands[name]
    for param in target.params:
        for name in (*param.opts, *param.secondary_opts) if param.param_type_name == "option" else [param.metavar]:
            assert re.search(rf"(^|[ ,]){re.escape(name)}([ ,]|$)", ran.out, flags=re.MULTILINE), name
    assert "\nExamples:\n  mwtool " in ran.out


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_the_examples_of_the_help_use_options_that_exist(command: list[str]) -> None:
    lines = run(*command, "--help").out.partition("Examples:\n")[2].splitlines()
    assert 1 <= len(lines) <= 4
    for line in lines:
        words = line.partition("#")[0].split()[1:]
        target = GROUP
        while words and words[0] in getattr(target, "commands", {}):
            target = target.commands[words.pop(0)]
        assert misspelled(respelled(words, target.params), target.params) is None, line


@pytest.mark.parametrize(
    ("command", "typed", "expected"),
    [
        ("eval", "--tasks a,b", "--task=a --task=b"),
        ("eval", "--task a,b", "--task=a,b"),
        ("eval", "--batch_size 4 --limit=2", "--batch-size=4 --limit=2"),
        ("eval", "--output_path x.json", "--output=x.json"),
        ("ablate", "--modes zero,retain -k 1", "--mode=zero --mode=retain -k 1"),
        ("ablate", "--controls false", "--no-controls"),
        ("finetune", "--learning_rate 1e-3", "--learning-rate=1e-3"),
        ("finetune", "--lr 1e-3", "--lr=1e-3"),
        ("finetune", "--lora_r 8 --lora_alpha 16", "--lora-r=8 --lora-alpha=16"),
        ("finetune", "--num_train_epochs 2", "--num-train-epochs=2"),
        ("finetune", "--per_device_train_batch_size 2", "--batch-size=2"),
        ("finetune", "--load_in_4bit", "--quantize=4bit"),
        ("finetune", "--load_in_4bit True", "--quantize=4bit"),
        ("finetune", "--load_in_4bit=false", ""),
        ("finetune", "--bf16 --use_dora", "--dtype=bfloat16 --peft=dora"),
        ("finetune", "--packing True --gradient_checkpointing False", "--packing --no-gradient-checkpointing"),
        ("finetune", "--output_dir out --model_name_or_path m", "--output-dir=out m"),
        ("finetune", "--data --packing -o d", "--data=--packing -o d"),
        ("finetune", "-- --learning_rate", "-- --learning_rate"),
    ],
)
def test_spellings_of_other_tools_mean_ours(command: str, typed: str, expected: str) -> None:
    assert respelled(typed.split(), params(command)) == expected.split()


def test_spellings_of_other_tools_reach_the_run() -> None:
    ours = run("finetune", "--show-curriculum", "--max-steps", 20, "--macdrop", "exp:0.5")
    theirs = run("finetune", "--show_curriculum", "--max_steps=20", "--macdrop", "exp:0.5", "--learning_rate", "1e-3")
    assert (theirs.code, theirs.out) == (0, ours.out)


@pytest.mark.parametrize(
    ("command", "typed", "offered"),
    [
        ("finetune", "--learning-rat", "--learning-rate"),
        ("finetune", "--lora-rank", "--lora-r"),
        ("finetune", "--num-train-epoch", "--num-train-epochs"),
        ("finetune", "--load-in-4bits", "--load-in-4bit"),
        ("finetune", "--outputdir", "--output-dir"),
        ("eval", "--taskss", "--task"),
        ("scan", "--super-weight", "--super-weights"),
    ],
)
def test_a_near_miss_is_led_to_the_option_that_was_meant(command: str, typed: str, offered: str) -> None:
    ran = run(command, typed, "1")
    assert (ran.code, ran.out) == (2, "")
    assert f"there is no option {typed}; did you mean {offered}?" in " ".join(ran.err.split())


def test_an_option_without_a_counterpart_says_what_to_do_instead() -> None:
    assert "--effective-batch" in run("finetune", "--gradient_accumulation_steps", 4).err


def test_the_defaults_of_the_command_line_are_those_of_the_library() -> None:
    """The names differ where Python has no options: only those that are the same are compared by name."""
    scan, thresholds = Settings(), Settings().thresholds
    for name in ("k", "bos"):
        assert default("scan", name) == getattr(scan, name)
    for name in ("magnitude", "ratio", "sun_ratio", "spike"):
        assert default("scan", name) == getattr(thresholds, name)
    recipe, asked = Recipe(), Asked(data="")
    for name in (
        "peft rank alpha dropout lr warmup epochs max_steps batch_size effective_batch max_length packing "
        "gradient_checkpointing quantize eval_share seed"
    ).split():
        assert default("finetune", name) == getattr(recipe, name), name
    (macdrop,) = (one for one in params("finetune") if one.name == "macdrop")
    assert (macdrop.default, macdrop.show_default) == (None, str(recipe.curriculum))
    assert (default("finetune", "split"), default("finetune", "allow_none")) == (asked.split, asked.allow_none)
    measuring = EvalConfig().measuring
    for name in ("batch_size", "limit", "seed", "protocol", "window", "bos", "delimiter", "new_tokens"):
        assert default("eval", name) == getattr(measuring, name), name
    for command in ("scan", "ablate", "eval"):
        assert (default(command, "dtype"), default(command, "device")) == (LoadOptions().dtype, LoadOptions().device)


def test_contradicting_options_are_named_without_blaming_one() -> None:
    assert WrongUsage("a contradicts b").format_message() == "a contradicts b"


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_what_the_output_cannot_encode_is_replaced(encoding: str) -> None:
    ran = run_apart("scan", "--help", PYTHONIOENCODING=encoding)
    assert (ran.code, ran.err) == (0, "")
    ran = run_apart("finetune", "--show-curriculum", "--max-steps", "20", PYTHONIOENCODING=encoding)
    assert ran.code == 0, ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the streams")
@pytest.mark.parametrize(
    ("closed", "status", "message"),
    [("<&-", 0, ""), (">&-", 1, "error: standard output is closed; redirect it to a file or give -o FILE\n")],
)
def test_a_stream_that_is_closed_is_no_traceback(closed: str, status: int, message: str) -> None:
    command = f"exec {sys.executable} -m mwtool adapters --json {closed}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, message)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize("allowed", [650_000, 750_000, 800_000])
def test_too_little_memory_ends_with_one_line(allowed: int) -> None:
    """Each limit stops another library: torch, transformers, the threads of safetensors and tokenizers.

    Those in C++ and Rust may abort, which nothing can catch; they say that an allocation failed.
    """
    command = f"ulimit -v {allowed}; exec {sys.executable} -m mwtool scan demo"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, -signal.SIGABRT), done.stderr
    if done.returncode == 1:
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_what_libraries_lack_memory_for_at_exit_is_not_shown() -> None:
    late = (
        "import atexit; atexit.register(lambda: [0] * 2**40); from mwtool.cli import memory_limit; memory_limit.watch()"
    )
    done = subprocess.run(
        ["sh", "-c", f"ulimit -v 4000000; exec {sys.executable} -c '{late}'"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("fault", [RuntimeError("can't start\nnew thread"), SystemError(), MemoryError()])
def test_a_failure_no_code_foresees_is_told_by_the_memory_limit_where_there_is_one(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_limit, "limit", lambda: 819_200_000)
    memory_limit._told_or_shown(type(fault), fault, None)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: this failed with 800,000 KiB of memory allowed (")
    monkeypatch.setattr(memory_limit, "limit", lambda: None)
    memory_limit._told_or_shown(type(fault), fault, None)
    assert type(fault).__name__ in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"]])
def test_help_imports_nothing_that_only_commands_use(arguments: list[str]) -> None:
    ran = run_apart(*arguments, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert imported & {"torch", "transformers", "numpy", "rich", "yaml", "filelock", "matplotlib"} == set()


def test_the_interpreter_does_not_search_for_cycles_at_its_end() -> None:
    code = (
        "import atexit, gc, sys; sys.argv = ['mwtool', '--version']\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"  # runs after what was registered later
        "from mwtool.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_a_terminal_shows_something_before_libraries_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    waiting.begin()
    assert shown.getvalue() == waiting.LINE
    waiting.clear()
    waiting.clear()
    assert shown.getvalue() == f"{waiting.LINE}\r{' ' * len(waiting.LINE)}\r"


def test_the_summaries_shown_without_importing_a_command_are_the_commands_own() -> None:
    for name, summary in SUMMARIES.items():
        assert GROUP.commands[name].name == name
        assert GROUP.commands[name].help.partition("\n\n")[0].replace("\n", " ") == summary


def test_help_imports_no_command_and_a_command_no_other() -> None:
    code = "import sys; sys.argv = ['mwtool', *sys.argv[1:]]; import mwtool.cli, contextlib\n"
    code += "with contextlib.suppress(SystemExit): mwtool.cli.main()\n"
    code += "print(*sorted(m for m in sys.modules if m.startswith('mwtool.')), file=sys.stderr)"
    found = {}
    for argument in ("--help", "export"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        found[argument] = set(done.stderr.splitlines()[-1].split())
    modules = {f"mwtool.cli.{name.replace('-', '_')}" for name in SUMMARIES}
    assert found["--help"] & modules == set()
    assert found["export"] & modules == {"mwtool.cli.export"}
