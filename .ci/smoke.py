"""Runs every command once on the bundled model, as a user does: quick, and the same on Linux, macOS and Windows.

Run it with the Python that mwtool is installed for: `python .ci/smoke.py`. It needs no extra, no network and no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def mwtool(folder: Path, *arguments: str) -> str:
    """Stdout of `mwtool ARGUMENTS` run in `folder`; ends the script if the command fails."""
    command = [sys.executable, "-m", "mwtool", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    print(f"{time.monotonic() - began:6.1f} s  exit {done.returncode}  mwtool {' '.join(arguments)}", flush=True)
    if done.returncode:
        sys.exit(f"failed; its stdout was\n{done.stdout}")
    return done.stdout


def document(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON document that `mwtool ARGUMENTS --json` prints."""
    found: dict[str, Any] = json.loads(mwtool(folder, *arguments, "--json"))
    return found


def main() -> None:
    """Each command, and what makes its result plausible."""
    with tempfile.TemporaryDirectory(prefix="mwtool smoke ") as name:  # a path with a space
        folder = Path(name)
        mwtool(folder, "--version")
        mwtool(folder, "scan", "--help")

        scan = document(folder, "scan", "demo", "-o", "massive.json", "--plot", "layers.png")
        assert (scan["massive"]["layer"], scan["massive"]["indices"][0]) == (1, 148), scan["massive"]
        assert (folder / "layers.png").stat().st_size > 0
        assert json.loads((folder / "massive.json").read_text(encoding="utf-8"))["massive"] == scan["massive"]

        texts = ("--positions", "Winter is cold.", "--sinks", "--text", "demo", "--limit", "2")
        whole = document(folder, "scan", "demo", *texts)
        assert whole["positions"]["placements"][1]["at"] == 3, whole["positions"]  # noqa: PLR2004 # the middle of 6 tokens
        assert 0.5 < whole["sinks"]["rate"] < 1, whole["sinks"]["rate"]  # noqa: PLR2004 # 0.77
        assert whole["triggers"]["tokens"][0]["id"] == 1, whole["triggers"]
        (checkpoint,) = document(folder, "track", "demo", "--plot", "track.png")["checkpoints"]
        assert checkpoint["massive"]["rows"] == [148], checkpoint

        few = ("--limit", "8", "--massive", "massive.json")
        ablation = document(folder, "ablate", "demo", "--mode", "zero", "-k", "1", "--no-controls", *few)
        (run,) = ablation["runs"]
        assert run["ratio"]["ppl:demo"] > 1.5, run  # noqa: PLR2004 # 1.95 on these windows

        mwtool(folder, "eval", "demo", "--attack", "none", "--attack", "zero:1", *few, "-o", "eval.json")
        records = [{"instruction": f"Add {i} and 1.", "output": f"It is {i + 1}."} for i in range(16)]
        (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
        training = ("--data", "data.json", "--max-steps", "2", "--effective-batch", "4", "--batch-size", "4")
        mwtool(folder, "finetune", "demo", *training, "--massive", "massive.json", "-o", "adapter")
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
        mwtool(folder, "scan", "adapter")

        mwtool(folder, "adapters", "check", "llama")
        mwtool(folder, "adapters", "new", "my_type", "package")


if __name__ == "__main__":
    main()
