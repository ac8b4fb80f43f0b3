"""Commands on a full disk, under other umasks, and without a home or a folder for temporary files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import run
from words import planted_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits, umasks and /proc are those of POSIX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = planted_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    (made / "t.txt").write_text(" ".join(f"w{n % 40 + 3}" for n in range(200)))
    return made


def commands(folder: Path) -> dict[str, list[object]]:
    """Every command that measures, quickly."""
    task = ["--task", f"ppl:{folder / 't.txt'}", "--window", 32]
    return {
        "scan": ["scan", folder],
        "eval": ["eval", folder, *task],
        "ablate": ["ablate", folder, *task, "-k", 1, "--mode", "zero", "--no-controls"],
        "quantize-check": ["quantize-check", folder, *task, "-k", 1, "--bits", 4],
    }


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may be larger: what a full disk is to those who write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["scan", "eval", "ablate", "quantize-check"])
def test_a_full_disk_leaves_the_former_document_and_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out.json"
    output.write_text("former")
    with disk_of(500):
        ran = run(*commands(folder)[name], "-o", output)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == (
        f"error: {output} could not be written: File too large; no partial file is left"
    )
    assert output.read_text() == "former"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_every_file_has_the_permissions_that_the_umask_leaves(folder: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        ran = {
            name: run(*command, "-o", tmp_path / f"{name}.json", "--plot", tmp_path / f"{name}.svg")
            for name, command in commands(folder).items()
        }
        ran["save"] = run(*commands(folder)["ablate"], "--save", tmp_path / "saved")
        ran["report"] = run("report", *sorted(tmp_path.glob("*.json")), "-o", tmp_path / "page.html")
        ran["export"] = run("export", tmp_path / "scan.json", "--to", "gptqmodel", "-o", tmp_path / "export.py")
    finally:
        os.umask(before)
    assert {name: one.err for name, one in ran.items() if one.code} == {}
    paths = [tmp_path / "saved", *tmp_path.rglob("*")]
    assert len(paths) > 12
    wrong = [path.name for path in paths if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~mask]
    assert wrong == []


IN_TURN = """
import json, sys
from mwtool.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mwtool", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments
"""


def without_a_place(*commands: list[object]) -> None:
    """HOME and the caches of libraries where nobody can write, not even root; no folder for temporary files."""
    nowhere = "/proc/nowhere"
    environment = {"HOME": nowhere, "HF_HOME": f"{nowhere}/hf", "TMPDIR": nowhere, "XDG_CACHE_HOME": nowhere}
    command = [sys.executable, "-c", IN_TURN, json.dumps(commands, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is there on Linux")
def test_no_home_no_cache_and_no_temporary_folder_are_needed(folder: Path, tmp_path: Path) -> None:
    made = ["--save", tmp_path / "saved", "--plot", tmp_path / "p.svg", "-o", tmp_path / "out.json"]
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "w3", "output": "w4 w5"}) + "\n")
    training = ["--data", tmp_path / "d.jsonl", "--batch-size", 1, "--effective-batch", 1, "--max-steps", 1]
    tuning = ["finetune", folder, *training, "-o", tmp_path / "tuned", "--eval-share", 0]
    without_a_place([*commands(folder)["ablate"], *made], tuning)
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == "mwtool.ablate/1"
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert (tmp_path / "p.svg").exists()
    assert (tmp_path / "tuned" / "macdrop.json").exists()
