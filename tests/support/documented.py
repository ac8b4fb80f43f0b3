"""Commands in the documentation, and the output that is shown below them.

A block of `sh` is run by tests; a block of text that follows it directly is what it printed. `python
tests/support/documented.py PAGE...` runs the commands again and writes their output into the pages.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WIDTH = 88
"""Columns of the terminal whose output is shown: what fits a page of the site."""
_BLOCK = re.compile(
    r"^```sh\n(?P<commands>.*?)^```\n(?:\n```(?:text)?\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Shown:
    """commands: of one block, as typed. output: what is shown below; None where nothing is."""

    commands: tuple[str, ...]
    output: str | None


def blocks(page: Path) -> Iterator[Shown]:
    """Every block of commands of a page."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        lines = found["commands"].replace("\\\n", " ").splitlines()
        yield Shown(tuple(line for line in lines if line.strip()), found["output"])


def words(output: str) -> list[str]:
    """What stays the same on other machines: neither numbers nor drawings nor the width of columns."""
    return re.findall(r"[^\W\d_]{2,}", output)


def refresh(page: Path, folder: Path) -> None:
    """Run each block that shows an output, in `folder`, and write what it prints now into the page."""

    def rerun(found: re.Match[str]) -> str:
        if found["output"] is None:
            return found.group()
        printed = "".join(_printed(line, folder) for line in found["commands"].replace("\\\n", " ").splitlines())
        return f"```sh\n{found['commands']}```\n\n```text\n{printed}```"

    page.write_text(_BLOCK.sub(rerun, page.read_text(encoding="utf-8")), encoding="utf-8")


def _printed(command: str, folder: Path) -> str:
    arguments = shlex.split(command)
    assert arguments[0] == "mwtool", command
    models = os.environ.get("DOCUMENTED_MODELS")  # a folder whose sub-folders have the ids of the Hub
    ran = subprocess.run(
        [sys.executable, "-m", "mwtool", *arguments[1:]],
        capture_output=True, encoding="utf-8", check=True, cwd=models or folder,
        env={**os.environ, "COLUMNS": str(WIDTH)},
    )  # fmt: skip
    lines = [line.rstrip() for line in ran.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            refresh(Path(name).resolve(), Path(scratch))
