"""skills/mwtool/SKILL.md, written from the commands: what agents read before they use mwtool.

`python tests/support/skill.py` writes it anew; a test says when that is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from mwtool.cli import app
from mwtool.cli.command import Group

SKILL = Path(__file__).parent.parent.parent / "skills" / "mwtool" / "SKILL.md"
HEAD = """\
---
name: mwtool
description: Find, measure and train against massive weights in large language models with the mwtool command line. \
Use it to scan a checkpoint for massive activations, to ablate rows, to evaluate perplexity and tasks, to fine-tune \
with MacDrop, to check and export what a quantizer should protect, and to compare scans.
---

# mwtool

MODEL is a Hub id, a folder, a PEFT adapter folder, a GGUF file, or `demo`, the bundled model, which works offline.

- Ask for documents: `--json` (or `--format json`) prints one JSON document to stdout and nothing else, `-o FILE` writes
  it. Notes, progress and errors go to stderr. `--format quiet` prints nothing but errors.
- The exit status is 0 for success, 1 for a failure, said in one line, 2 for wrong usage, 130 for an interruption.
- Layers and rows count from 0. `schema` names the kind and the version of a document; docs/json.md has every key.
- A saved scan is what `--massive FILE`, `mwtool compare` and `mwtool export` take: scan once, with `-o`.
- `mwtool COMMAND --help` describes every option.
"""


def skill() -> str:
    """The text of the file."""
    return "\n".join([HEAD, *_commands(get_command(app))])


def _commands(group: Any, path: str = "mwtool") -> Iterator[str]:
    for name in group.commands:
        command = group.commands[name]
        yield from (f"## {path} {name}", "", str(command.help).partition("\n")[0], "")
        if command.epilog:
            yield from ("```sh", *command.epilog.splitlines(), "```", "")
        if isinstance(command, Group):
            yield from _commands(command, f"{path} {name}")


if __name__ == "__main__":
    SKILL.write_text(skill().rstrip() + "\n", encoding="utf-8")
